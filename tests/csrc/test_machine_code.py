"""The machine code of the bulk kernels, held to csrc/machine_code.json by csrc/check_machine_code.py."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_machine_code_is_as_committed():
    done = subprocess.run([sys.executable, CSRC / "check_machine_code.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if "skipped" in done.stdout:
        pytest.skip(done.stdout.strip())


def test_committed_machine_code_is_lean():
    """Whoever writes the table anew cannot commit spills, or memory accesses among the logits."""
    kernels = json.loads((CSRC / "machine_code.json").read_text())["kernels"]
    assert len(kernels) == 24
    for name, row in kernels.items():
        assert row["spills"] == row["global"] == row["block barriers"] == 0, name
        assert row["bulk copies"] >= 3, name
        if "softcap" not in name:
            assert row["loads ahead"] == 4 and row["A"] + row["B"] < 15, name


def test_loads_ahead_are_counted():
    spec = importlib.util.spec_from_file_location("check_machine_code", CSRC / "check_machine_code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = ["LDS.128 R4, [R2]", "LDS.128 R8, [R2+0x10]", "FADD R9, R9, R7", "LDS.128 R12, [R2+0x20]"]
    ops = [i.split()[0] for i in code]
    assert module.loads_ahead(code, ops, (0, 3)) == 2
