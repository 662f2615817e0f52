"""The cross-entropy kernel for sm_90 and later (csrc/cuda/cross_entropy_bulk.cuh): on a GPU where there is one, and
anywhere through an emulation (csrc/tests/emulate/bulk_copy.h), both against float64.

In the emulation copies end late and in random order, and threads fall behind at random: waits, slots and parities are
tested, fences and speed are not.
"""

import ctypes
import dataclasses
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.ops.common import NATIVE_BUILT

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BF16, F32 = torch.bfloat16, torch.float32
COMPILE = (
    # Fortified, longjmp refuses to go from one stack to another (the default of some distributions).
    "-O2 -U_FORTIFY_SOURCE -std=c++17 -ffp-contract=off -fno-strict-aliasing -DFASTFT_EMULATE_BULK -shared -fPIC "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas"
)


POINTERS = ("logits", "grad", "target", "loss", "lse", "class_weight", "token_weight", "grad_scale", "bad_row")
SIZES = ("rows", "vocab", "logits_stride", "grad_stride", "ignore_index", "token_weight_stride", "grad_scale_stride")
FACTORS = ("label_smoothing", "z_loss", "softcap", "logit_scale")


class Call(ctypes.Structure):  # csrc/tests/emulated_cross_entropy_bulk.cpp has the same fields
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_float) for name in FACTORS),
        *((name, ctypes.c_int) for name in ("is_bf16", "variant", "clusters", "seed")),
    )


@dataclasses.dataclass
class Options:
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    class_weight: torch.Tensor | None = None
    token_weight: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None
    variant: int = 0  # warps + 100 * least blocks a row
    lse: bool = True
    grad: str = "in place"  # "other memory", "none"
    padding: int = 0  # elements between rows
    clusters: int = 2
    seed: int = 0


@dataclasses.dataclass
class Result:
    loss: torch.Tensor
    lse: torch.Tensor
    grad: torch.Tensor | None
    bad_row: int
    used: int = 0  # blocks a row * 100 + warps


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    """The kernel compiled for the CPU; kept until a source or the compiler's flags change."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    sources = sorted([*CSRC.glob("cuda/*.cuh"), CSRC / "tests/emulate/bulk_copy.h", CSRC / "include/fastft/dtype.h"])
    source = CSRC / "tests/emulated_cross_entropy_bulk.cpp"
    key = hashlib.sha256(b"".join(p.read_bytes() for p in (*sources, source)) + (compiler + COMPILE).encode())
    path = CSRC.parent / "build" / f"emulated_cross_entropy_bulk-{key.hexdigest()[:12]}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, "made.so")
            include = [f"-I{CSRC / 'tests/emulate'}", f"-I{CSRC / 'include'}"]
            subprocess.run([compiler, *COMPILE.split(), *include, "-o", made, source], check=True)
            made.replace(path)
    return ctypes.CDLL(str(path))


def placed(x: torch.Tensor, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x amid memory that nobody may touch, from a multiple of 128 bytes as on a GPU; and all of that memory."""
    rows, vocab = x.shape
    size, stride = x.element_size(), vocab + padding
    flat = torch.full((rows * stride + 512,), 3.0, dtype=x.dtype)
    start = 256 + (-(flat.data_ptr() // size + 256)) % (128 // size)
    view = flat.as_strided((rows, vocab), (stride, 1), start)
    view.copy_(x)
    return view, flat


def arguments(logits, y, grad, loss, lse, bad_row, o: Options) -> dict[str, int | float]:
    """What both the emulation and _C.cross_entropy take."""
    address = lambda t: 0 if t is None else t.data_ptr()
    stride = lambda t: 0 if t is None or t.ndim == 0 else t.stride(0)
    tensors = (logits, grad, y, loss, lse, o.class_weight, o.token_weight, o.grad_scale, bad_row)
    sizes = (*logits.shape, logits.stride(0), stride(grad), o.ignore_index, stride(o.token_weight))
    return {
        **dict(zip(POINTERS, map(address, tensors), strict=True)),
        **dict(zip(SIZES, (*sizes, stride(o.grad_scale)), strict=True)),
        **{name: getattr(o, name) for name in (*FACTORS, "variant")},
    }


def emulated(library: ctypes.CDLL, x: torch.Tensor, y: torch.Tensor, o: Options) -> Result:
    logits, flat = placed(x, o.padding)
    before = flat.clone()
    grad, grad_flat = {"in place": (logits, flat), "none": (None, None)}.get(o.grad) or placed(
        torch.full_like(x, 7.0), o.padding
    )
    loss, lse = torch.full((len(x),), 7.0), torch.full((len(x),), 7.0)
    bad_row = torch.tensor([-1])
    call = arguments(logits, y, grad, loss, lse if o.lse else None, bad_row, o)
    used = library.emulated_cross_entropy_bulk(
        ctypes.byref(Call(**call, is_bf16=x.dtype == BF16, clusters=o.clusters, seed=o.seed))
    )
    assert used > 0, "no plan for this vocabulary"
    for memory, view in ((flat, logits), (grad_flat, grad)):
        if memory is not None:
            written = torch.zeros_like(memory, dtype=torch.bool)
            if view is grad:
                written.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
            untouched = before if memory is flat else torch.full_like(memory, 3.0)
            same = memory.view(torch.uint8) == untouched.view(torch.uint8)  # bytes: NaN is not NaN
            assert same.view(-1, x.element_size())[~written].all(), "wrote outside"
    return Result(loss, lse, None if grad is None else grad.clone(), int(bad_row), used)


def launch(logits, y, grad, loss, lse, bad_row, o: Options) -> None:
    """_C.cross_entropy on the current stream."""
    from fastft import _C

    _C.cross_entropy(
        **arguments(logits, y, grad, loss, lse, bad_row, o),
        device=logits.device.index,
        stream=torch.cuda.current_stream().cuda_stream,
        dtype=_C.BF16 if logits.dtype == BF16 else _C.F32,
        num_threads=1,
    )


def on_gpu(x: torch.Tensor, y: torch.Tensor, o: Options) -> Result:
    cuda = lambda t: None if t is None else t.cuda()
    memory = torch.full((x.shape[0], x.shape[1] + o.padding), 3.0, dtype=x.dtype, device="cuda")
    logits = memory[:, : x.shape[1]]
    logits.copy_(x)
    grad = {"in place": logits, "none": None}.get(o.grad, torch.full_like(memory, 7.0)[:, : x.shape[1]])
    loss, lse = torch.full((len(x),), 7.0, device="cuda"), torch.full((len(x),), 7.0, device="cuda")
    bad_row = torch.zeros((), dtype=torch.int64, device="cuda")
    weights = {name: cuda(getattr(o, name)) for name in ("class_weight", "token_weight", "grad_scale")}
    launch(logits, y.cuda(), grad, loss, lse if o.lse else None, bad_row, dataclasses.replace(o, **weights))
    assert (memory[:, x.shape[1] :] == 3.0).all(), "wrote outside"
    return Result(loss.cpu(), lse.cpu(), None if grad is None else grad.cpu(), int(bad_row))


def by_torch(x, y, o: Options, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and lse of each row, and the gradient."""
    factor = lambda t: torch.ones((), dtype=dtype) if t is None else t.to(dtype)
    x = x.to(dtype).requires_grad_()
    c = x * o.logit_scale
    if o.softcap:
        c = o.softcap * torch.tanh(c / o.softcap)
    counts = (y != o.ignore_index) & (y >= 0) & (y < x.shape[1])
    weight = None if o.class_weight is None else o.class_weight.to(dtype)
    label = torch.where(counts, y, 0)
    loss = F.cross_entropy(c, label, weight, label_smoothing=o.label_smoothing, reduction="none")
    lse = torch.logsumexp(c, -1)
    loss = torch.where(counts, factor(o.token_weight) * (loss + o.z_loss * lse**2), 0.0)
    (grad,) = torch.autograd.grad((loss * factor(o.grad_scale)).sum(), x)
    grad = torch.where(counts[:, None], grad, 0.0)
    bad = ~counts & (y != o.ignore_index)
    return torch.where(bad, torch.nan, loss.detach()), lse.detach(), grad


def check(result: Result, x: torch.Tensor, y: torch.Tensor, o: Options) -> None:
    """Errors are at most twice those of torch in float32 (gradients then rounded to the dtype), and a little."""
    loss, lse, grad = by_torch(x, y, o, torch.float64)
    peer_loss, _, peer_grad = by_torch(x, y, o, F32)
    assert torch.equal(result.loss.isnan(), loss.isnan()), (result.loss, loss)

    def off(a, b):  # relative to the larger of 1 and the value; equal infinities are equal
        return torch.where(a.double() == b, 0.0, (a.double() - b).abs() / b.abs().clamp(min=1)).nan_to_num(nan=0.0)

    assert (off(result.loss, loss) <= 2 * off(peer_loss, loss) + 1e-6).all(), off(result.loss, loss)
    if o.lse:
        finite = lse.isfinite()
        assert (off(result.lse, lse)[finite] <= 1e-6).all(), off(result.lse, lse)
    counts = (y >= 0) & (y < x.shape[1])
    bad_rows = (~counts & (y != o.ignore_index)).nonzero().flatten().tolist()
    assert result.bad_row == (bad_rows[0] if bad_rows else -1)
    if result.grad is None:
        return
    assert not result.grad[~counts].any(), "the gradient of a row that does not count"
    ok = ~loss.isnan()
    assert result.grad[counts & ~ok].isnan().all(), "a row whose loss is NaN has a gradient"
    size = 1.0 if o.grad_scale is None else float(o.grad_scale.abs().max())
    size *= 1.0 if o.token_weight is None else float(o.token_weight.abs().max())
    error = (result.grad[ok].double() - grad[ok]).abs()
    rounded = (grad[ok].to(x.dtype).double() - grad[ok]).abs()
    peer = torch.maximum((peer_grad[ok].to(x.dtype).double() - grad[ok]).abs(), rounded)
    limit = 2 * peer + (2**-8 * 0.55 if x.dtype == BF16 else 2e-6) * grad[ok].abs() + 1e-9 * size + 1e-38
    if o.softcap:  # 1 - tanh^2 cancels: what an error of tanh in its last place costs
        limit += 5e-7 * grad[ok].abs() * torch.cosh(x[ok].double() * o.logit_scale / o.softcap) ** 2
    over = error > limit
    assert not over.any(), (
        f"{int(over.sum())} gradients off, by up to {float((error / limit).nan_to_num().max())} limits"
    )


def make(rows: int, vocab: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * 1000003 + vocab)
    return (torch.randn(rows, vocab) * spread).to(dtype), torch.randint(0, vocab, (rows,))


def half_ignored(x, y):
    y[::2] = -100


def extremes(x, y):
    """Huge logits, rows of -inf in part and whole, NaN, inf."""
    n = x.shape[1]
    x[0] *= 1e4
    x[1] *= 1e30
    x[2, 5] = 1e38
    x[3, 1:] = -torch.inf
    y[3] = 0
    x[4, : n // 2] = -torch.inf
    y[4] = n - 1
    x[5] = -torch.inf
    x[6, 77] = torch.nan
    x[7, n - 1] = torch.inf


def ignored_extremes(x, y):
    extremes(x, y)
    y[[0, 2, 6, 7]] = -100


def out_of_range(x, y):
    y[2], y[4], y[0] = x.shape[1], -7, -100


def ends(x, y):
    """Targets in the head, the tail and where slices meet."""
    n = x.shape[1]
    y[:] = torch.tensor([0, 1, 2, 3, 4, 5, n - 1, n - 2, n - 3, n - 4, n // 2, 255])


RANDOM = torch.Generator().manual_seed(1)
PER_ROW = torch.rand(6, generator=RANDOM) - 0.5
CASES: dict[str, tuple] = {  # rows, vocab, what is done to logits and targets, options
    **{f"{v} classes": (9 if v < 30000 else 3, v, None, {}) for v in (1, 7, 17, 1000, 4099, 32000, 50257)},
    "128256 classes": (3, 128256, None, {}),
    "151937 classes": (3, 151937, None, {"padding": 3}),
    "one cluster": (5, 32003, None, {"clusters": 1}),
    "4 blocks": (3, 32003, None, {"variant": 408, "clusters": 1}),
    "8 blocks": (3, 32003, None, {"variant": 816, "clusters": 1}),
    "16 warps": (4, 32003, None, {"variant": 16}),
    "other memory": (5, 20011, None, {"grad": "other memory", "padding": 5}),
    "half ignored, lse": (7, 32003, half_ignored, {}),
    "half ignored, not read": (7, 32003, half_ignored, {"lse": False}),
    "many rows, one cluster": (70, 1001, half_ignored, {"lse": False, "clusters": 1}),
    "smoothing, z-loss": (6, 20011, None, {"label_smoothing": 0.1, "z_loss": 1e-3, "grad_scale": PER_ROW}),
    "smoothing, 16 warps": (4, 20011, None, {"label_smoothing": 0.1, "variant": 16, "grad": "other memory"}),
    "smoothing, 4 blocks": (3, 20011, None, {"label_smoothing": 0.1, "variant": 408}),
    "scales": (
        6,
        9001,
        half_ignored,
        {"grad_scale": torch.tensor(0.25), "token_weight": PER_ROW + 1, "logit_scale": 0.7, "z_loss": 1e-3},
    ),
    "class weights": (6, 9001, half_ignored, {"class_weight": torch.rand(9001, generator=RANDOM), "z_loss": 1e-3}),
    "softcap": (5, 9001, None, {"softcap": 5.0, "logit_scale": 1.3, "z_loss": 1e-3, "grad_scale": torch.tensor(0.1)}),
    "extremes": (8, 8193, extremes, {}),
    "ignored extremes": (8, 8193, ignored_extremes, {}),
    "out of range": (6, 9001, out_of_range, {"lse": False}),
    "out of range, lse": (6, 9001, out_of_range, {}),
    "ends": (12, 4099, ends, {}),
    "ends, 4 blocks": (12, 4099, ends, {"variant": 408}),
    "forward": (7, 32003, half_ignored, {"grad": "none"}),
    "forward, not read": (7, 32003, half_ignored, {"grad": "none", "lse": False}),
    "forward, 4 blocks": (5, 50257, None, {"grad": "none", "variant": 408, "softcap": 5.0}),
    "forward, smoothing": (5, 20011, None, {"grad": "none", "label_smoothing": 0.1}),
    "forward, extremes": (8, 8193, ignored_extremes, {"grad": "none"}),
}


def case(name: str, dtype: torch.dtype, **more) -> tuple[torch.Tensor, torch.Tensor, Options]:
    rows, vocab, change, options = CASES[name]
    x, y = make(rows, vocab, dtype)
    if change is not None:
        change(x, y)
    return x, y, Options(**options, **more)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_emulated(library, name, dtype):
    x, y, options = case(name, dtype, seed=len(name))
    result = emulated(library, x, y, options)
    if options.variant:
        assert result.used % 100 == options.variant % 100
        assert result.used // 100 >= options.variant // 100
    check(result, x, y, options)


@pytest.mark.parametrize("name", ["forward, 4 blocks", "4 blocks", "many rows, one cluster"])
def test_emulated_with_other_timings(library, name):
    """1002 once hung: a lane of the mover napped while lane 0 filled the ring twice, and missed its barrier's phase."""
    for seed in (1002, 1003, 1004):
        x, y, options = case(name, F32, seed=seed)
        check(emulated(library, x, y, options), x, y, options)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_emulated_bits_repeat_whatever_the_timing(library, dtype):
    x, y = make(3, 40001, dtype)
    first, second = (emulated(library, x, y, Options(seed=seed)) for seed in (1, 2))
    for name in ("loss", "lse", "grad"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


needs_hopper = pytest.mark.skipif(
    not NATIVE_BUILT or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
    reason="no GPU with sm_90 or later, or fastft._C is not built",
)


def forced(o: Options, vocab: int) -> Options:
    """Left alone, a short row goes to another kernel."""
    return o if o.variant or vocab > 60000 else dataclasses.replace(o, variant=8)


@needs_hopper
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, dtype):
    x, y, options = case(name, dtype)
    options = forced(options, x.shape[1])
    first, second = on_gpu(x, y, options), on_gpu(x, y, options)
    check(first, x, y, options)
    for field in ("loss", "lse", "grad"):
        a, b = getattr(first, field), getattr(second, field)
        assert a is b is None or torch.equal(a.nan_to_num(nan=3.0), b.nan_to_num(nan=3.0)), f"{field} does not repeat"


@needs_hopper
def test_on_gpu_many_rows_each_of_several_blocks():
    """Rings go round many times, and there are more rows than clusters."""
    x, y = make(600, 32771, BF16)
    y[::7] = -100
    for variant in (8, 208, 408, 16, 816):
        options = Options(variant=variant, grad_scale=torch.tensor(1e-3))
        check(on_gpu(x, y, options), x, y, options)


@needs_hopper
def test_on_gpu_in_a_graph():
    x, y = make(40, 50257, BF16)
    logits, target = x.cuda(), y.cuda()
    grad, loss, lse = torch.empty_like(logits), torch.empty(40, device="cuda"), torch.empty(40, device="cuda")
    bad_row = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the first call of this variant: nothing it asks the device may disturb a capture
        launch(logits, target, grad, loss, lse, bad_row, Options(variant=216))
    logits.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    check(Result(loss.cpu(), lse.cpu(), grad.cpu(), int(bad_row)), x.flip(0), y, Options())
