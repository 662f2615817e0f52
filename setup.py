"""Builds fastft/_C from csrc with CMake and Ninja. FASTFT_BUILD says what to build:

auto (default)  CUDA when a small CUDA program can be compiled and linked here, else CPU only; the log says which and
                why
cpu             CPU kernels only
cuda            CPU and CUDA kernels; an error when there is no working toolkit
none            no native module: a pure Python package

FASTFT_CUDA_ARCHS="80;90;100" names the GPU architectures (the last also as PTX). No torch is needed to build, and the
result serves every torch version: the kernels take raw addresses.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
# What compilers and CMake read, and keep in a build folder.
TOOLS = re.compile(
    "CC|CXX|CPATH|CPLUS_INCLUDE_PATH|LIBRARY_PATH|(C|CXX|CPP|CUDA|LD)FLAGS|CUDA(CXX|HOSTCXX)|(NVCC|CMAKE)_.*"
)
PROBE = """
#include <cuda_runtime.h>
__global__ void one(int* p) { *p = 1; }
int main() { int n = 0; one<<<1, 1>>>(nullptr); return cudaGetDeviceCount(&n) == cudaSuccess ? 0 : 1; }
"""


def say(message: str) -> None:
    print(f"fastft: {message}", file=sys.stderr, flush=True)


def build_mode() -> str:
    mode = os.environ.get("FASTFT_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise SetupError(f"FASTFT_BUILD={mode!r} is not known; use one of {', '.join(MODES)}")
    return mode


def cuda_archs() -> list[str]:
    archs = [a for a in re.split(r"[;, ]+", os.environ.get("FASTFT_CUDA_ARCHS", "80;90;100")) if a]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SetupError(
                f"FASTFT_CUDA_ARCHS: {arch!r} is no architecture; write e.g. FASTFT_CUDA_ARCHS='80;90;100'"
            )
    if not archs:
        raise SetupError("FASTFT_CUDA_ARCHS is set but empty; write e.g. FASTFT_CUDA_ARCHS='80;90;100'")
    return archs


def find_nvcc() -> tuple[str | None, list[str]]:
    """The CUDA compiler, and the places that were looked at. CUDACXX, where it is set, is the only one."""
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    if os.environ.get("CUDACXX"):
        places = [os.environ["CUDACXX"]]
    return next((found for p in places if (found := shutil.which(p))), None), places


def probe_cuda(arch: str) -> tuple[str | None, str]:
    """nvcc when a CUDA program really compiles and links with it, and the reason for the answer. A toolkit without its
    libraries, or with a host compiler it refuses, is common: finding nvcc on PATH says little."""
    nvcc, places = find_nvcc()
    if nvcc is None:
        return None, f"no nvcc (looked at {', '.join(places)})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE)
        command = [nvcc, f"-arch=sm_{arch}", "-cudart", "static", "-o", str(Path(folder, "probe")), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return (
            None,
            f"{nvcc} cannot compile and link a small CUDA program: {(result.stderr or result.stdout).strip()[-800:]}",
        )
    return nvcc, f"{nvcc} compiles and links CUDA programs"


def resolve_cuda(mode: str) -> str | None:
    """The nvcc to build with, None for a CPU build."""
    if mode == "cpu":
        say("building CPU kernels only (FASTFT_BUILD=cpu)")
        return None
    nvcc, why = probe_cuda(cuda_archs()[-1])
    if nvcc is None and mode == "cuda":
        raise SetupError(
            f"FASTFT_BUILD=cuda, but {why}. Install a CUDA toolkit (nvcc, cudart headers and libcudart_static), point "
            "CUDA_HOME or CUDACXX at it, or use FASTFT_BUILD=cpu."
        )
    say(f"building CPU {'and CUDA kernels' if nvcc else 'kernels only'} (FASTFT_BUILD={mode}): {why}")
    return nvcc


def build_tools() -> tuple[str, str, str]:
    """cmake, ninja and pybind11's CMake folder: those of this Python's environment before those of PATH."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = [shutil.which(name, path=scripts) for name in ("cmake", "ninja")]
    try:
        import pybind11
    except ImportError:
        pybind11 = None
    if pybind11 is None or None in found:
        missing = [
            name
            for name, there in zip(("cmake", "ninja", "pybind11"), (*found, pybind11), strict=True)
            if there is None
        ]
        raise SetupError(
            f"missing to build: {', '.join(missing)}; "
            f"build with isolation (plain pip install .) or run pip install {' '.join(missing)}"
        )
    return (*found, pybind11.get_cmake_dir())


def version(tool: str) -> str:
    try:
        return subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""


class CMakeBuild(build_ext):
    def build_folder(self, nvcc: str | None) -> Path:
        """One per mode, since a cache configured without CUDA cannot be turned into one with it. An editable install
        (pip install -e) would build in a folder that setuptools removes: it has one that stays, so that the next one
        compiles what has changed since; one per place and tools, since a cache keeps the first that it saw."""
        mode = "cuda" if nvcc else "cpu"
        if not self.editable_mode:
            return Path(self.build_temp).resolve() / mode
        compiler = os.environ.get("CXX") or "c++"
        told = [str(ROOT), shutil.which(compiler), *(version(tool) for tool in (compiler, nvcc) if tool)]
        told += [f"{name}={value}" for name, value in sorted(os.environ.items()) if TOOLS.fullmatch(name)]
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:8]
        return ROOT / "build" / "editable" / f"{sys.implementation.cache_tag}-{mode}-{digest}"

    def build_extension(self, ext: Extension) -> None:
        nvcc = resolve_cuda(build_mode())
        cmake, ninja, pybind11_dir = build_tools()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = self.build_folder(nvcc)
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [
            "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir}",
            f"-DFASTFT_VERSION={self.distribution.get_version()}",
            f"-DFASTFT_CUDA={'ON' if nvcc else 'OFF'}",
        ]  # fmt: skip
        if nvcc:
            arguments += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFASTFT_CUDA_ARCHS={';'.join(cuda_archs())}"]
        configure = [cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), *arguments]
        if subprocess.run(configure).returncode != 0:
            say(f"once more, in an empty {folder}")
            shutil.rmtree(folder)
            subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Put in place by rename: a process that has the old module mapped must not see it change.
        fresh = target.with_suffix(".new")
        shutil.copy2(folder / target.name, fresh)
        fresh.replace(target)


def extensions() -> list[Extension]:
    if build_mode() == "none":
        say("no native module (FASTFT_BUILD=none); only the triton and reference backends will be there")
        return []
    return [Extension("fastft._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
