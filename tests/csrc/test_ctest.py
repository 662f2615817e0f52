"""Builds and runs the C++ tests: every kernel on every instruction set against float64 (csrc/tests),
plain and under sanitizers.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def build_and_run(*options: str) -> Path:
    """In a folder that stays, for these options, compiler and checkout: Ninja compiles what has changed since."""
    for tool in ("cmake", "ctest", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH")
    run = lambda *command: subprocess.run(command, check=True, timeout=500)
    versions = [
        subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        for tool in (os.environ.get("CXX", "c++"), "cmake")
    ]
    flags = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    key = hashlib.sha256(repr((str(CSRC), versions, flags, options)).encode()).hexdigest()[:12]
    folder = CSRC.parent / "build" / f"ctest-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(
            "cmake",
            "-S",
            str(CSRC),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            "-DFASTFT_TESTS=ON",
            "-DFASTFT_PYTHON=OFF",
            *options,
        )
        run("cmake", "--build", str(folder))
        ctest(folder)
    return folder


def ctest(folder: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "FASTFT_CPU"}
    result = subprocess.run(
        ["ctest", "--test-dir", str(folder), "--output-on-failure", "--parallel", "2"],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
    assert "tests passed" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctest():
    assert_no_shared_code(build_and_run())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctest_under_sanitizers(tmp_path):
    """Reads and writes past an end, overflow, misalignment:
    AddressSanitizer and UndefinedBehaviorSanitizer stop at the first.
    """
    probe = tmp_path / "probe.cpp"
    probe.write_text(
        "#include <cstdlib>\n"
        "int main() { int* p = static_cast<int*>(std::malloc(4)); int x = p[std::rand() % 2 + 1]; return x != x; }\n"
    )
    compiler = os.environ.get("CXX", "g++")
    compiled = subprocess.run(
        [compiler, "-fsanitize=address,undefined", "-o", tmp_path / "probe", probe],
        capture_output=True,
        text=True,
        check=False,
    )
    if compiled.returncode != 0:
        pytest.skip(f"{compiler} has no sanitizer runtimes here: {compiled.stderr[-300:]}")
    found = subprocess.run([tmp_path / "probe"], capture_output=True, text=True, check=False)
    assert "heap-buffer-overflow" in found.stderr, "the sanitizer does not see what it is there for"
    build_and_run(
        "-DFASTFT_SANITIZE=address,undefined",
        "-DFASTFT_EMULATE=OFF",
        "-DCMAKE_BUILD_TYPE=Sanitized",  # a type of its own: csrc/CMakeLists.txt sets Release's flags
        "-DCMAKE_CXX_FLAGS_SANITIZED=-O1",
    )


def assert_no_shared_code(build: Path) -> None:
    """A weak symbol (an inline function, a std:: template) compiled with AVX-512 could replace the
    baseline's copy at link time, and the module would die of an illegal instruction on an older CPU.
    """
    objects = [*build.rglob("kernels_avx2.cpp.o"), *build.rglob("kernels_avx512.cpp.o")]
    if shutil.which("nm") is None or not objects:
        return
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        defined = [line for line in symbols if line.split()[1] in "TDBRWVu" and line[0] != " "]
        assert len(defined) == 1 and "fastft::cpu::kernels_avx" in defined[0], defined
