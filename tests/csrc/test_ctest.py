"""Builds and runs the C++ tests: every kernel on every instruction set against float64 (csrc/tests)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctest(tmp_path):
    for tool in ("cmake", "ctest", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH")
    run = lambda *command: subprocess.run(command, check=True, timeout=500)  # noqa: E731
    run("cmake", "-S", str(CSRC), "-B", str(tmp_path), "-G", "Ninja", "-DFASTFT_TESTS=ON", "-DFASTFT_PYTHON=OFF")
    run("cmake", "--build", str(tmp_path))
    environment = {k: v for k, v in os.environ.items() if k != "FASTFT_CPU"}
    result = subprocess.run(
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure"], capture_output=True, text=True, timeout=500, env=environment
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
    assert "tests passed" in result.stdout
