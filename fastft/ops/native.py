"""Glue from tensors to the raw addresses that `fastft._C` takes (see fastft/_C.pyi for the contract)."""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
_STATE_STORE = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # csrc/include/fastft/adamw.h


@functools.cache
def module() -> ModuleType:
    """`fastft._C`. ImportError when it was not built."""
    try:
        return importlib.import_module("fastft._C")
    except ImportError as error:
        raise ImportError(f"not built: {error}") from error


def refuses(device_type: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why the native module cannot do this; "" when it can."""
    if device_type not in ("cpu", "cuda"):
        return f"no kernels for {device_type}"
    if device_type == "cuda" and not module().build_info()["cuda"]:
        return "this build has no CUDA"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return ""


def loader(op: str) -> Callable[[], Callable]:
    """For the table: a function that returns this file's implementation of `op`, or raises ImportError."""

    def load():
        module()
        return {"cross_entropy": cross_entropy, "adamw": adamw, "sum_squares": sum_squares}[op]

    return load


def cross_entropy(
    logits: Tensor,  # (N, V), rows contiguous
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,) float32
    token_weight: Tensor | None,  # (N,) or () float32
    grad_scale: Tensor | None,  # (N,) or () float32
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss: Tensor | None,  # (N,) float32 out
    lse: Tensor | None,  # (N,) float32 out
    grad: Tensor | None,  # (N, V) out, may be logits
    bad_row: Tensor,  # () int64 out
) -> None:
    """One call of `_C.cross_entropy`."""
    device, stream = _place(logits.device)
    module().cross_entropy(
        device=device,
        stream=stream,
        logits=logits.data_ptr(),
        dtype=tag(logits.dtype),
        rows=logits.shape[0],
        vocab=logits.shape[1],
        logits_stride=logits.stride(0),
        target=target.data_ptr(),
        class_weight=address(weight),
        token_weight=address(token_weight),
        token_weight_stride=_stride(token_weight),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        loss=address(loss),
        lse=address(lse),
        grad=address(grad),
        grad_stride=0 if grad is None else grad.stride(0),
        grad_scale=address(grad_scale),
        grad_scale_stride=_stride(grad_scale),
        bad_row=bad_row.data_ptr(),
        num_threads=torch.get_num_threads(),
    )


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor],
    remainders: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    offsets: Sequence[int],
    *,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: int,
    stochastic_rounding: bool,
) -> None:
    """One call of `_C.adamw`. All tensors of one index have one dense layout; all of a list one dtype."""
    device, stream = _place(params[0].device)
    lists = (
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        copies,
        remainders,
        exp_avg_scales,
        exp_avg_sq_scales,
        steps,
    )
    captured = {}
    if device >= 0 and torch.cuda.is_current_stream_capturing():  # where the module cannot keep a table of its own
        memory = torch.empty(len(params) * module().ADAMW_SCRATCH, dtype=torch.uint8, device=params[0].device)
        captured["scratch"] = memory.data_ptr()
    module().adamw(
        device,
        stream,
        *(list(map(Tensor.data_ptr, tensors)) for tensors in lists),
        list(map(Tensor.numel, params)),
        list(offsets),
        tag(params[0].dtype),
        tag(grads[0].dtype),
        2 if remainders else int(stochastic_rounding),  # ParamStore
        _STATE_STORE[exp_avgs[0].dtype],
        seed,
        lr,
        address(lr_tensor),
        beta1,
        beta2,
        eps,
        weight_decay,
        decoupled,
        maximize,
        address(grad_scale),
        address(found_inf),
        torch.get_num_threads(),
        **captured,
    )


def sum_squares(tensors: list[Tensor], out: Tensor) -> None:
    """One call of `_C.sum_squares`: contiguous tensors of one dtype; out is () float64."""
    device, stream = _place(out.device)
    scratch = None if device < 0 else out.new_empty(module().SUM_SQUARES_SCRATCH)
    module().sum_squares(
        device=device,
        stream=stream,
        tensors=[t.data_ptr() for t in tensors],
        numels=[t.numel() for t in tensors],
        dtype=tag(tensors[0].dtype),
        out=out.data_ptr(),
        scratch=address(scratch),
        num_threads=torch.get_num_threads(),
    )


def _place(device: torch.device) -> tuple[int, int]:
    if device.type == "cpu":
        return -1, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


def tag(dtype: torch.dtype) -> int:
    """The module's name for float32 or bfloat16."""
    return module().F32 if dtype == torch.float32 else module().BF16


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.ndim == 0 else tensor.stride(0)
