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
    assert_no_shared_code(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "FASTFT_CPU"}
    result = subprocess.run(
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure"], capture_output=True, text=True, timeout=500, env=environment
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
    assert "tests passed" in result.stdout


def assert_no_shared_code(build: Path) -> None:
    """A weak symbol (an inline function, a std:: template) compiled with AVX-512 could replace the baseline's copy at link time, and
    the module would die of an illegal instruction on an older CPU."""
    objects = [*build.rglob("kernels_avx2.cpp.o"), *build.rglob("kernels_avx512.cpp.o")]
    if shutil.which("nm") is None or not objects:
        return
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        defined = [line for line in symbols if line.split()[1] in "TDBRWVu" and line[0] != " "]
        assert len(defined) == 1 and "fastft::cpu::kernels_avx" in defined[0], defined
