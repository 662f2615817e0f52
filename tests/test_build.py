"""The build and the binding: modes, messages, what the module links, and what it says about wrong arguments."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup_py(*arguments: str, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def native():
    return pytest.importorskip("fastft._C", reason="no native module in this installation")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter: import order and the chosen CPU path are decided once per process."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_unknown_mode():
    result = setup_py("--version", FASTFT_BUILD="gpu")
    assert result.returncode != 0
    assert "FASTFT_BUILD='gpu'" in result.stderr and "auto, cpu, cuda, none" in result.stderr


@pytest.mark.parametrize("broken", ["missing", "failing"])
def test_cuda_without_toolkit(tmp_path, broken):
    """With nvcc absent, and with one that cannot compile (a toolkit without its libraries)."""
    nvcc = tmp_path / "nvcc"
    if broken == "failing":
        nvcc.write_text("#!/bin/sh\necho cudart_static is missing >&2\nexit 1\n")
        nvcc.chmod(0o755)
    out = ("build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l"))
    result = setup_py(*out, FASTFT_BUILD="cuda", CUDACXX=str(nvcc))
    assert result.returncode != 0
    assert "FASTFT_BUILD=cuda, but" in result.stderr and "FASTFT_BUILD=cpu" in result.stderr
    assert ("cudart_static is missing" if broken == "failing" else f"no nvcc (looked at {nvcc})") in result.stderr


def test_missing_build_tools_are_named(tmp_path):
    (tmp_path / "pybind11.py").write_text("raise ImportError('hidden by a test')")
    result = setup_py(
        "build_ext",
        "--build-temp",
        str(tmp_path / "t"),
        "--build-lib",
        str(tmp_path / "l"),
        FASTFT_BUILD="cpu",
        PYTHONPATH=str(tmp_path),
    )
    assert (
        result.returncode != 0
        and "missing to build: pybind11; " in result.stderr
        and "pip install pybind11" in result.stderr
    )


@pytest.mark.slow
def test_auto_says_what_it_took(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    out = ("build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l"))
    result = setup_py(*out, FASTFT_BUILD="auto", CUDACXX=str(nvcc))
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"building CPU kernels only (FASTFT_BUILD=auto): {nvcc} cannot compile" in result.stderr
    assert list((tmp_path / "l" / "fastft").glob("_C*"))
    assert "warning:" not in result.stdout + result.stderr


def test_none_builds_nothing(tmp_path):
    result = setup_py("build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path), FASTFT_BUILD="none")
    assert result.returncode == 0 and "no native module (FASTFT_BUILD=none)" in result.stderr
    assert not list(tmp_path.rglob("_C*"))


def test_sdist_has_sources(tmp_path):
    # A copy, because setuptools leaves its egg-info beside the sources.
    tree = tmp_path / "tree"
    keep = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    tree.mkdir()
    for name in keep:
        shutil.copy(ROOT / name, tree / name)
    for name in ("csrc", "fastft"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "d")]
    subprocess.run(
        command, cwd=tree, check=True, capture_output=True, timeout=120, env={**os.environ, "FASTFT_BUILD": "none"}
    )
    (archive,) = (tmp_path / "d").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()} | {
        "setup.py",
        "fastft/_C.pyi",
    }
    assert wanted <= names


@pytest.mark.slow
@pytest.mark.parametrize("archs", ["90", pytest.param("80 100", marks=pytest.mark.long)])
def test_cuda_sources_compile_clean(archs):
    """Every .cu for sm_80, sm_90 and sm_100 with warnings as errors; needs nvcc, no GPU. In CI the module itself is
    built so (.ci/run).
    """
    if "-Werror" in os.environ.get("CUDAFLAGS", "") and archs == "90" and native().build_info()["cuda"]:
        pytest.skip("the module was built with warnings as errors")
    if shutil.which(os.environ.get("CUDACXX", "nvcc")) is None and os.environ.get("FASTFT_REQUIRE_NVCC") != "1":
        pytest.skip("no nvcc on PATH")
    environment = {**os.environ, "FASTFT_CUDA_ARCHS": archs}
    result = subprocess.run(
        [str(ROOT / "csrc" / "check_cuda.sh")], capture_output=True, text=True, timeout=280, env=environment
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "all clean" in result.stdout and result.stdout.count("== ") == len(archs.split()) * len(
        list((ROOT / "csrc" / "cuda").glob("*.cu"))
    )
    spills = [
        line for line in result.stdout.splitlines() if "spill stores" in line and "0 bytes spill stores" not in line
    ]
    assert not spills


def test_check_cuda_without_nvcc():
    for require, code in (("0", 0), ("1", 1)):
        environment = {**os.environ, "CUDACXX": "/nowhere/nvcc", "FASTFT_REQUIRE_NVCC": require}
        result = subprocess.run(
            [str(ROOT / "csrc" / "check_cuda.sh")], capture_output=True, text=True, env=environment, timeout=20
        )
        assert result.returncode == code and "skipped, no nvcc" in result.stdout


@pytest.mark.parametrize("order", ["import torch, fastft._C", "import fastft._C, torch"])
def test_one_openmp_runtime(order):
    """torch's wheel brings its own libgomp.

    Ours asks for the same SONAME, so whichever is loaded first serves both; two would mean two thread pools spinning on
    the same cores.
    """
    native()
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    code = (
        order
        + "\nprint(*{l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l}, sep=chr(10))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 1, result.stdout


def test_no_cuda_library_is_needed():
    """A CUDA build must import where there is no driver: cudart is static,
    and it looks for the driver on the first call.
    """
    if not sys.platform.startswith("linux") or shutil.which("ldd") is None:
        pytest.skip("needs ldd")
    libraries = subprocess.run(["ldd", native().__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in libraries and "libtorch" not in libraries and "libc10" not in libraries


def test_build_info():
    info = native().build_info()
    assert set(info) == {"version", "cuda", "cuda_archs", "compiler", "openmp", "cpu_paths"}
    assert info["openmp"] is True and info["cpu_paths"][0] == "scalar"
    assert bool(info["cuda_archs"]) == info["cuda"]


@pytest.mark.parametrize("path", ["scalar", "avx2", "avx512"])
def test_forced_cpu_path(path):
    features = native().cpu_features()
    able = {"scalar": True, "avx2": features["avx2"], "avx512": features["avx512f"] and features["avx512bw"]}[path]
    result = python("import fastft._C as C; print(C.cpu_path())", FASTFT_CPU=path)
    if able:
        assert result.stdout.strip() == path
    else:
        assert "ValueError" in result.stderr and f"FASTFT_CPU={path}" in result.stderr


def test_unknown_cpu_path():
    native()
    result = python("import fastft._C as C; C.cpu_path()", FASTFT_CPU="sse")
    assert "ValueError: FASTFT_CPU=sse is not known; use scalar, avx2 or avx512" in result.stderr


ADAMW = {
    "device": -1,
    "stream": 0,
    "params": [],
    "grads": [],
    "exp_avgs": [],
    "exp_avg_sqs": [],
    "max_exp_avg_sqs": [],
    "copies": [],
    "remainders": [],
    "exp_avg_scales": [],
    "exp_avg_sq_scales": [],
    "steps": [],
    "numels": [],
    "offsets": [],
    "param_dtype": 0,
    "grad_dtype": 0,
    "param_store": 0,
    "state_store": 0,
    "seed": 0,
    "lr": 0.1,
    "lr_ptr": 0,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled": True,
    "maximize": False,
    "grad_scale": 0,
    "found_inf": 0,
    "num_threads": 0,
}
CROSS_ENTROPY = {
    "device": -1,
    "stream": 0,
    "logits": 0,
    "dtype": 0,
    "rows": 0,
    "vocab": 5,
    "logits_stride": 5,
    "target": 0,
    "class_weight": 0,
    "token_weight": 0,
    "token_weight_stride": 1,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": 0.0,
    "logit_scale": 1.0,
    "loss": 0,
    "lse": 0,
    "grad": 0,
    "grad_stride": 0,
    "grad_scale": 0,
    "grad_scale_stride": 1,
    "bad_row": 0,
    "num_threads": 0,
}


@pytest.mark.parametrize(
    "op, change, message",
    [
        ("adamw", {"param_dtype": 5}, "param_dtype=5"),
        ("adamw", {"grad_dtype": -1}, "grad_dtype=-1"),
        ("adamw", {"grads": [8]}, "grads has 1 entries, params has 0"),
        ("adamw", {"numels": [8, 9]}, "numels has 2 entries, params has 0"),
        ("adamw", {"copies": [8]}, "copies has 1 entries, params has 0"),
        ("adamw", {"device": -2}, "device=-2"),
        ("adamw", {"state_store": 3}, "state_store=3"),
        ("adamw", {"param_store": 1}, "param_store=1 is for bf16 params"),
        ("adamw", {"exp_avg_scales": [8]}, "exp_avg_scales has 1 entries, params has 0"),
        (
            "adamw",
            {"params": [8], "grads": [8], "exp_avgs": [8], "exp_avg_sqs": [8], "steps": [8], "numels": [-1]},
            r"numels\[0\]=-1 is negative",
        ),
        ("cross_entropy", {"dtype": 7}, "dtype=7"),
        ("cross_entropy", {"rows": -1}, "rows=-1 is negative"),
        ("cross_entropy", {"vocab": -3}, "vocab=-3 is negative"),
        ("cross_entropy", {"logits_stride": -3}, "logits_stride=-3 is negative"),
        ("cross_entropy", {"rows": 2, "vocab": 0}, "vocab=0 with rows=2"),
        ("cross_entropy", {"softcap": -1.0}, "softcap"),
    ],
)
def test_wrong_arguments(op, change, message):
    C = native()
    arguments = ADAMW if op == "adamw" else CROSS_ENTROPY
    getattr(C, op)(**arguments)  # nothing to do is fine
    with pytest.raises(ValueError, match=message):
        getattr(C, op)(**{**arguments, **change})


@pytest.mark.parametrize("op", ["adamw", "cross_entropy"])
def test_cuda_device_in_a_cpu_build(op):
    C = native()
    if C.build_info()["cuda"]:
        pytest.skip("this is a CUDA build")
    with pytest.raises(ValueError, match="FASTFT_BUILD=cuda"):
        getattr(C, op)(**{**(ADAMW if op == "adamw" else CROSS_ENTROPY), "device": 0})


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_cuda_build_imports_without_a_driver(tmp_path):
    """Builds one architecture where there is a toolkit, and runs a CPU kernel from that build."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    out = ("build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l"))
    result = setup_py(*out, timeout=500, FASTFT_BUILD="cuda", FASTFT_CUDA_ARCHS="90")
    assert result.returncode == 0, result.stderr[-3000:]
    code = f"import _C; assert _C.build_info()['cuda_archs'] == ['90']; _C.adamw(**{ADAMW!r})"
    result = python(code, PYTHONPATH=str(tmp_path / "l" / "fastft"))
    assert result.returncode == 0, result.stderr
