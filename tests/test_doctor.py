"""The doctor's report, and that its self-check can fail."""

import json
import math
import subprocess
import sys

import pytest
import torch

from fastft import doctor
from fastft.ops import backends
from tests.ops.common import NATIVE_BUILT


def test_report_is_complete_and_passes(capsys):
    assert doctor.main(json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "native", "machine", "backends", "self_check"}
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["peft"]
    assert found["native"]["built"] == NATIVE_BUILT
    rows = {(row["op"], row["device"], row["dtype"]): row for row in found["backends"]}
    assert len(rows) == 4 * len(backends.ops()) and set(doctor.CHECKS) == set(backends.ops())
    picked = rows["cross_entropy", "cpu", "bfloat16"]["picked"]
    assert picked == ("native" if NATIVE_BUILT else "reference")
    checked = {(row["op"], row["backend"], row["dtype"]) for row in found["self_check"] if row["device"] == "cpu"}
    assert {(op, "reference", d) for op in backends.ops() for d in ("float32", "bfloat16")} <= checked
    assert not NATIVE_BUILT or {("adamw", "native", "bfloat16"), ("cross_entropy", "native", "float32")} <= checked
    assert all(0 <= row["error"] <= row["tolerance"] for row in found["self_check"])


def test_tables(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "Self-check against float64" in out and "cross_entropy" in out and "FAIL" not in out


def _corrupt(monkeypatch, op, damage):
    """Put a damaged implementation of the reference into the table."""
    real = backends.implementation(op, "reference")
    monkeypatch.setitem(backends._loaded, (op, "reference"), lambda *args, **kwargs: damage(real, args, kwargs))


def _raise(real, args, kwargs):
    raise RuntimeError("illegal instruction")


def _after(change):
    def damage(real, args, kwargs):
        real(*args, **kwargs)
        change(args)

    return damage


DAMAGES = {
    "adamw_param_slightly_off": ("adamw", _after(lambda args: args[0][0].mul_(1.02))),
    "adamw_step_forgotten": ("adamw", _after(lambda args: args[5][0].sub_(1))),
    "adamw_variance_off": ("adamw", _after(lambda args: args[3][0].mul_(1.02))),
    "adamw_one_nan": (
        "adamw",
        _after(lambda args: args[1][0].view(-1)[7:8].fill_(math.nan) and args[2][0][7].fill_(math.nan)),
    ),
    "adamw_does_nothing": ("adamw", lambda *_: None),
    "adamw_copy_forgotten": ("adamw", _after(lambda args: args[6][0].zero_())),
    "adamw_cannot_run": ("adamw", _raise),
    "scale_off": ("scale", _after(lambda args: args[2].mul_(1.02))),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_self_check_finds_a_wrong_implementation(case, monkeypatch, capsys):
    op, damage = DAMAGES[case]
    _corrupt(monkeypatch, op, damage)
    assert doctor.main(json=True) == 1
    rows = json.loads(capsys.readouterr().out)["self_check"]
    failed = {(row["op"], row["backend"]) for row in rows if not row["passed"]}
    assert failed == {(op, "reference")}
    if case == "adamw_cannot_run":
        assert {row["problem"] for row in rows if not row["passed"]} == {"illegal instruction"}


@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
@pytest.mark.parametrize("output", ["loss", "grad"])
def test_self_check_finds_a_wrong_cross_entropy(output, monkeypatch, capsys):
    real = backends.implementation("cross_entropy", "native")

    def damaged(*args, **kwargs):
        real(*args, **kwargs)
        if kwargs[output] is not None:
            kwargs[output].mul_(1.02)

    monkeypatch.setitem(backends._loaded, ("cross_entropy", "native"), damaged)
    assert doctor.main() == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_self_check_finds_a_wrong_linear_cross_entropy(which, monkeypatch, capsys):
    real = backends.implementation("linear_cross_entropy", "native")

    def damaged(*args, **kwargs):
        grads = real(*args, **kwargs)
        grads[which].mul_(1.05)
        return grads

    monkeypatch.setitem(backends._loaded, ("linear_cross_entropy", "native"), damaged)
    assert doctor.main(json=True) == 1
    rows = json.loads(capsys.readouterr().out)["self_check"]
    assert {(row["op"], row["backend"]) for row in rows if not row["passed"]} == {("linear_cross_entropy", "native")}


def test_without_the_native_module_and_triton():
    program = "import sys; sys.modules['fastft._C'] = sys.modules['triton'] = None\n"
    program += "from fastft.doctor import main; sys.exit(main(json=True))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert not found["native"]["built"] and "fastft._C" in found["native"]["reason"]
    assert {row["backend"] for row in found["self_check"]} == {"reference"}
    reasons = next(row["unavailable"] for row in found["backends"] if row["op"] == "adamw" and row["device"] == "cpu")
    assert "pip install 'fastft[triton]'" in reasons["triton"]
