"""The scripts that need a machine of their own do run: small, on the CPU."""

import sys

import pytest

import launch

ROOT = launch.ROOT


def test_gpu_script_runs_without_one():
    process = launch.start(
        [
            sys.executable,
            "benchmarks/gpu.py",
            "--quick",
            "--device",
            "cpu",
            "ceilings",
            "adamw",
            "sum_squares",
            "linear_cross_entropy",
        ],
        cwd=ROOT,
    )
    output = launch.finish(process, 120)
    assert process.returncode == 0, output[-3000:]
    for expected in ("GB/s, bf16 GEMM", "adamw ", "torch fused", "sum_squares ", "linear_cross_entropy ", "x ours"):
        assert expected in output


def test_small_cases_for_the_sanitizer_run_without_it():
    process = launch.start([sys.executable, "benchmarks/gpu_small.py", "--device", "cpu"], cwd=ROOT)
    output = launch.finish(process, 120)
    assert process.returncode == 0 and "optimizers done" in output, output[-3000:]


def test_gpu_parts_go_on_after_one_that_fails(tmp_path):
    """Without a GPU the build fails; the part after it runs, and what fell short comes last."""
    variables = {"OUT": str(tmp_path), "PYTHON": sys.executable}
    process = launch.start(["bash", ROOT / "benchmarks" / "gpu.sh", "build", "no-such-part", "sanitize"], variables)
    output = launch.finish(process, 120)
    if "Torch not compiled with CUDA" not in output and "NVIDIA" not in output:
        pytest.skip("there is a GPU here")
    assert process.returncode == 1
    assert "== sanitize: status" in output
    last = output.partition("== short\n")[2].splitlines()
    assert "build: ended with 1" in last and "no-such-part: there is no such part" in last


def test_cross_entropy_variants_run_without_a_gpu():
    process = launch.start(
        [sys.executable, "benchmarks/ce_variants.py", "--quick", "--device", "cpu", "--vocabs", "997"], cwd=ROOT
    )
    output = launch.finish(process, 120)
    assert process.returncode == 0, output[-3000:]
    assert "variant 0 forward" in output and "contender=torch" in output and "WRONG" not in output, output


def test_resource_report_is_read():
    import importlib.util

    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "benchmarks" / "cuda_resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    log = (
        "== a.cu sm_80\n"
        "void fastft::(anonymous namespace)::k<fastft::bf16, false>(fastft::Args)\n"
        "    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "    used 64 registers, used 1 barriers, 512 bytes smem\n"
        "== a.cu sm_90\n"
        "void fastft::(anonymous namespace)::k<fastft::bf16, false>(fastft::Args)\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "    used 30 registers\n"
        "check_cuda: all clean\n"
    )
    assert module.parse(log) == ({"k<bf16, false>": {"80": (64, 512, 12), "90": (30, 0, 0)}}, ["80", "90"])


def test_plan_table_is_the_recorded_one(tmp_path):
    """It is arithmetic on published numbers, so what is in benchmarks/results is what the code says today."""
    process = launch.start([sys.executable, "benchmarks/plan.py", "--out", str(tmp_path / "plan.md")], cwd=ROOT)
    assert "predicted" in launch.finish(process, 60) and process.returncode == 0
    assert (tmp_path / "plan.md").read_text() == (ROOT / "benchmarks" / "results" / "plan.md").read_text()
