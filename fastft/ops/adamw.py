"""One AdamW step over lists of tensors, in place.

`decoupled=True` is AdamW (arXiv 1711.05101, algorithm 2), False is Adam with L2 (arXiv 1412.6980). The rules, term by term, are
torch.optim.AdamW's and stand in fastft/_C.pyi.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft.ops import adamw_reference, backends, native, triton


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    copies: Sequence[Tensor | None] | None = None,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Update params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs (empty: no amsgrad), steps and copies in place.

    All tensors of one index have one shape. params: float32 or bfloat16 (float16, float64: reference backend only), grads likewise,
    of any mix; the state is float32 (float64 for float64 params) whatever the dtype of the params. Any strides.

    steps       one float32 0-dim tensor per param, on the param's device: steps done so far; each is incremented.
    copies      None, or per param None or a bfloat16 tensor that receives the updated param, rounded.
    lr          a float, or a 0-dim tensor (so that a captured CUDA graph sees a new value).
    grad_scale  0-dim float32 on the params' device; gradients are multiplied by it (in float32).
    found_inf   0-dim float32 on the params' device; when it is not 0 nothing at all is written.

    Raises ValueError for lists or tensors that do not fit together, RuntimeError for sparse or complex gradients.
    """
    amsgrad = len(max_exp_avg_sqs) > 0
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, copies)
    groups: dict[tuple, list[int]] = {}  # one kernel call takes one device, one pair of dtypes, and all copies or none
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        has_copy = copies is not None and copies[i] is not None
        groups.setdefault((param.device, param.dtype, grad.dtype, has_copy), []).append(i)
    for (device, param_dtype, grad_dtype, has_copy), members in groups.items():
        chosen = backends.select("adamw", backend, device.type, (param_dtype, grad_dtype))
        lr_tensor = lr.to(device, torch.float32, non_blocking=True).reshape(()) if isinstance(lr, Tensor) else None
        _op(
            [params[i] for i in members],
            [grads[i] for i in members],
            [exp_avgs[i] for i in members],
            [exp_avg_sqs[i] for i in members],
            [max_exp_avg_sqs[i] for i in members] if amsgrad else [],
            [steps[i] for i in members],
            [copies[i] for i in members] if has_copy else [],
            lr_tensor,
            grad_scale.to(device, torch.float32, non_blocking=True) if grad_scale is not None else None,
            found_inf.to(device, torch.float32, non_blocking=True) if found_inf is not None else None,
            0.0 if lr_tensor is not None else lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            decoupled,
            maximize,
            chosen,
        )


def _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, copies) -> None:
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    if len(max_exp_avg_sqs):
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    if copies is not None:
        lists["copies"] = copies
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{len(params)} params, but {len(tensors)} {name}")
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if tensor is None:
                continue
            shape = () if name == "steps" else param.shape
            if tensor.shape != shape or tensor.device != param.device:
                raise ValueError(
                    f"{name}[{i}] must be {tuple(shape)} on {param.device}, not {tuple(tensor.shape)} on {tensor.device}"
                )
            _check_dtype(name, i, tensor, param)


def _check_dtype(name: str, i: int, tensor: Tensor, param: Tensor) -> None:
    if name == "grads":
        if tensor.layout != torch.strided:
            raise RuntimeError(f"grads[{i}] is {tensor.layout}: adamw takes dense gradients only")
        if not tensor.is_floating_point() or not param.is_floating_point():
            raise RuntimeError(f"params[{i}] is {param.dtype} and grads[{i}] {tensor.dtype}: adamw takes real floating types only")
        return
    expected = {"steps": torch.float32, "copies": torch.bfloat16}.get(name, state_dtype(param.dtype))
    if tensor.dtype != expected:
        raise ValueError(f"{name}[{i}] must be {expected}, not {tensor.dtype}")


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of exp_avg and exp_avg_sq: float32, except beside float64 params."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    "fastft::adamw", mutates_args={"params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "copies"}
)
def _op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    backend: str,
) -> None:
    """One device, one pair of dtypes. Hands the backend tensors of equal, dense layout, through copies where they are not."""
    if lr_tensor is not None and lr_tensor.device.type == "cpu":
        lr, lr_tensor = lr_tensor.item(), None
    lists = [list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs), list(copies)]
    copy_back = []  # (the caller's tensor, our dense copy of it)
    for i in range(len(params)):
        if all(tensors[i].is_contiguous() for tensors in lists if tensors):
            continue
        layout = _layout(params[i])
        for tensors in lists:
            if tensors and tensors[i].stride() != layout and tensors[i].numel():
                given = tensors[i]
                tensors[i] = torch.empty_strided(given.shape, layout, dtype=given.dtype, device=given.device).copy_(given)
                if tensors is not lists[1]:
                    copy_back.append((given, tensors[i]))
    dense_params, dense_grads, dense_exp_avgs, dense_exp_avg_sqs, dense_max_exp_avg_sqs, dense_copies = lists
    backends.implementation("adamw", backend)(
        dense_params,
        dense_grads,
        dense_exp_avgs,
        dense_exp_avg_sqs,
        dense_max_exp_avg_sqs,
        steps,
        dense_copies,
        lr=lr,
        lr_tensor=lr_tensor,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    for given, dense in copy_back:
        given.copy_(dense)


@_op.register_fake
def _fake(*_):
    return None


def _layout(param: Tensor) -> tuple[int, ...]:
    """Strides of a layout without gaps: the param's own if it is one (channels_last, say), else contiguous."""
    if torch._prims_common.is_non_overlapping_and_dense_or_false(param):
        return param.stride()
    return torch._prims_common.make_contiguous_strides_for(param.shape)


backends.register("adamw", "native", load=native.loader("adamw"), refuses=native.refuses)
backends.register(
    "adamw", "triton", load=triton.loader("adamw", "adamw"), refuses=triton.refuses, automatic_on=frozenset({"cuda"})
)
backends.register("adamw", "reference", load=lambda: adamw_reference.adamw, refuses=lambda *_: "")
