"""The Triton kernels beyond the interpreter: they compile to machine code for real GPUs, without one.

The interpreter runs Python, so it also accepts what the compiler does not: a variable that changes its type in a
branch, say.
"""

import os
import subprocess
import sys

import pytest

from tests.ops.common import TRITON_INSTALLED

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")

PROGRAM = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastft.ops.triton import adamw, cross_entropy, decoder, sum_squares

target = GPUTarget("cuda", int(sys.argv[1]), 32)

def build(kernel, types, constants, num_warps=4):
    names = kernel.arg_names
    assert set(names) == set(types) | set(constants), set(names) ^ (set(types) | set(constants))
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(kernel, signature, constexprs={(names.index(name),): value for name, value in constants.items()})
    assert "cubin" in compile(source, target=target, options={"num_warps": num_warps}).asm

F = "*fp32"
for dtype in ("*fp32", "*bf16"):
    types = dict(logits=dtype, logits_stride="i32", target="*i64", class_weight=F, class_weight_sum=F, token_weight=F,
                 token_weight_stride="i32", grad_scale=F, grad_scale_stride="i32", loss=F, lse=F, grad=dtype,
                 grad_stride="i32", bad_row="*i64", vocab="i32", ignore_index="i32", label_smoothing="fp32",
                 smooth_per_class="fp32", z_loss="fp32", softcap="fp32", logit_scale="fp32")
    absent = dict.fromkeys(("class_weight", "class_weight_sum", "token_weight", "lse", "grad_scale"))
    plain = dict(CAPPED=False, SMOOTH=False, BLOCK=8192)
    # Triton makes 1 a constant.
    full = dict(CAPPED=True, SMOOTH=True, BLOCK=2048, token_weight_stride=1, grad_scale_stride=1)
    kernel = cross_entropy._cross_entropy_kernel
    build(kernel, types, {**plain, **absent}, 16)
    build(kernel, types, {**plain, **absent, "grad": None}, 16)
    ones = {"vocab": 1, "logits_stride": 1, "grad_stride": 1, "BLOCK": 1}
    build(kernel, types, {**plain, **absent, **ones, "loss": None})
    build(kernel, types, full, 8)
    build(kernel, types, {**full, "class_weight": None, "class_weight_sum": None, "ignore_index": 1}, 8)
    for in_place in (True, False):
        types = dict(grad=dtype, factor=F, out=dtype, n="i64")
        build(cross_entropy._scale_kernel, types, dict(IN_PLACE=in_place, BLOCK=4096))

    build(sum_squares._partial_sums, dict(x_ptr=dtype, out_ptr="*fp64", n="i64"), dict(BLOCK=4096, PER_PROGRAM=65536))

    types = dict(x=dtype, residual=dtype, weight=dtype, total=dtype, y=dtype, rstd=F, columns="i32", eps="fp32")
    build(decoder._rms_forward, types, dict(BLOCK=4096), 8)
    build(decoder._rms_forward, types, dict(BLOCK=1024, residual=None, total=None))
    types = dict(dy=dtype, x=dtype, weight=dtype, rstd=F, extra=dtype, dx=dtype, y=dtype, dweight=F, rows="i32",
                 columns="i32", each="i32")
    build(decoder._rms_backward, types, dict(BLOCK=4096), 8)
    build(decoder._rms_backward, types, dict(BLOCK=1024, extra=None, y=None, each=1))
    types = dict(qkv=dtype, cos=dtype, sin=dtype, stride="i32", heads="i32", dim="i32", period="i32")
    build(decoder._rope_forward, types, dict(HEADS=64, HALF=32, SIGN=-1.0))
    types = dict(dq=dtype, dk=dtype, dv=dtype, out=dtype, cos=dtype, sin=dtype, heads="i32", groups="i32", dim="i32",
                 period="i32")
    build(decoder._rope_backward, types, dict(HEADS=32, GROUPS=4, HALF=64))
    build(decoder._rope_backward, types, dict(HEADS=8, GROUPS=1, HALF=32, groups=1))
    types = dict(gate=dtype, up=dtype, a=dtype, stride="i32", width="i32")
    build(decoder._swiglu_forward, types, dict(BLOCK=1024))
    build(decoder._swiglu_backward, {**types, "da": dtype, "dgate": dtype, "dup": dtype}, dict(BLOCK=1024))
    build(decoder._swiglu_backward, {**types, "da": dtype, "dgate": dtype, "dup": dtype}, dict(BLOCK=1024, a=None))

    types = dict(param=dtype, grad="*bf16", exp_avg=F, exp_avg_sq=F, max_exp_avg_sq=F, copy="*bf16", remainder="*i16",
                 exp_avg_scale=F, exp_avg_sq_scale=F, factors=F, grad_scale=F, found_inf=F, numel="i64", beta2="fp32",
                 one_minus_beta1="fp32", one_minus_beta2="fp32", eps="fp32", weight_decay="fp32", seed_base="i64",
                 offset="i64")
    absent = dict.fromkeys(("max_exp_avg_sq", "copy", "grad_scale", "found_inf", "remainder", "exp_avg_scale",
                            "exp_avg_sq_scale"))
    no_scales = dict.fromkeys(("remainder", "exp_avg_scale", "exp_avg_sq_scale"))
    kernel = adamw._adamw_kernel
    build(kernel, types, {**absent, "numel": 1, "DECOUPLED": True, "MAXIMIZE": False, "STOCHASTIC": False})
    build(kernel, types, {**no_scales, "DECOUPLED": False, "MAXIMIZE": True, "STOCHASTIC": False})
    options = dict(DECOUPLED=True, MAXIMIZE=False)
    half = {**types, "exp_avg": "*bf16", "exp_avg_sq": "*bf16", "max_exp_avg_sq": "*bf16"}
    codes = {**types, "exp_avg": "*u8", "exp_avg_sq": "*u8"}
    one_of = {"max_exp_avg_sq": None, "copy": None}
    if dtype == "*fp32":
        build(kernel, half, {**no_scales, **options, "copy": None, "STOCHASTIC": False, "offset": 1, "seed_base": 1})
    else:
        build(kernel, codes, {**one_of, "remainder": None, **options, "STOCHASTIC": True})
        build(kernel, codes, {**one_of, **options, "STOCHASTIC": False})
"""


@pytest.mark.parametrize("capability", [90, *(pytest.param(c, marks=pytest.mark.long) for c in (80, 100))])
def test_kernels_compile_for_gpus(capability, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = tmp_path / "program.py"  # Triton reads the source of what it compiles
    program.write_text(PROGRAM)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, program, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
