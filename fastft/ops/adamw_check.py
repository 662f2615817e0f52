"""What a caller of adamw may get wrong.

Whole lists are compared, which costs 1 us per tensor for all checks together; the sentence about the culprit is made
only when there is one.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastft.ops import quantized_state

_REQUIRED = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
_SCALES = ("exp_avg_scales", "exp_avg_sq_scales")
_DTYPES = {"copies": torch.bfloat16, "remainders": torch.int16, **dict.fromkeys(_SCALES, torch.float32)}
_OPTIONAL = ("max_exp_avg_sqs", "copies", "remainders", *_SCALES)
Kind = tuple[torch.device, torch.dtype, torch.dtype, torch.layout, torch.dtype, torch.dtype, torch.dtype]


def check(lists: dict[str, Sequence], stochastic_rounding: bool, seed: int) -> list[Kind]:
    """lists: adamw's arguments by name; empty: absent. Raises what adamw says it raises.

    Returns the (device, dtype of param, of grad, layout of grad, dtypes of exp_avg, exp_avg_sq, step) of every tensor.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps = (lists[name] for name in _REQUIRED)
    count = len(params)
    for name, values in lists.items():
        if len(values) != count and (len(values) or name in _REQUIRED):
            raise ValueError(f"{count} params, but {len(values)} {name}")
    shapes, devices = [p.shape for p in params], [p.device for p in params]
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if [t.shape for t in tensors] != shapes or [t.device for t in tensors] != devices:
            _refuse_place(name, tensors, zip(shapes, devices, strict=True))
    if any(t.ndim for t in steps) or [t.device for t in steps] != devices:
        _refuse_place("steps", steps, ((torch.Size(()), device) for device in devices))
    kinds = [
        (device, p.dtype, g.dtype, g.layout, m.dtype, v.dtype, s.dtype)
        for device, p, g, m, v, s in zip(devices, params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ]
    optional = [name for name in _OPTIONAL if len(lists[name])]
    coded = _SCALES[0] in optional
    for kind in kinds[:1] if kinds.count(kinds[0]) == count else set(kinds):
        if not _is_fine(*kind[1:], coded):
            _refuse_kind(lists, coded)
    if optional:
        _check_optional(lists, optional, list(zip(shapes, devices, strict=True)))
    if stochastic_rounding or lists["remainders"]:
        _check_params(lists, stochastic_rounding)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and less than 2^63, not {seed}")
    if any(offset < 0 for offset in lists["offsets"]):
        raise ValueError("offsets count elements, so none is negative")
    return kinds


def _is_fine(
    param: torch.dtype,
    grad: torch.dtype,
    layout: torch.layout,
    exp_avg: torch.dtype,
    exp_avg_sq: torch.dtype,
    step: torch.dtype,
    coded: bool,
) -> bool:
    real = param.is_floating_point and grad.is_floating_point and layout == torch.strided
    return real and exp_avg in _allowed(param, coded) and exp_avg_sq == exp_avg and step == torch.float32


def _allowed(param_dtype: torch.dtype, coded: bool) -> tuple[torch.dtype, ...]:
    if coded:
        return (torch.uint8,)
    return (torch.float64,) if param_dtype == torch.float64 else (torch.float32, torch.bfloat16)


def _refuse_place(name: str, tensors: Sequence[Tensor], places: Iterable[tuple[torch.Size, torch.device]]) -> None:
    for i, (tensor, (shape, device)) in enumerate(zip(tensors, places, strict=True)):
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"{name}[{i}] must be {tuple(shape)} on {device}, not {tuple(tensor.shape)} on {tensor.device}"
            )


def _refuse_kind(lists: dict[str, Sequence], coded: bool) -> None:
    for i, (param, grad, exp_avg) in enumerate(zip(lists["params"], lists["grads"], lists["exp_avgs"], strict=True)):
        if grad.layout != torch.strided:
            raise RuntimeError(f"grads[{i}] is {grad.layout}: adamw takes dense gradients only")
        if not grad.is_floating_point() or not param.is_floating_point():
            raise RuntimeError(
                f"params[{i}] is {param.dtype} and grads[{i}] {grad.dtype}: adamw takes real floating types only"
            )
        allowed = _allowed(param.dtype, coded)
        if exp_avg.dtype not in allowed:
            hint = " (which comes with scales)" if exp_avg.dtype == torch.uint8 else ""
            raise ValueError(f"exp_avgs[{i}] must be {' or '.join(map(str, allowed))}, not {exp_avg.dtype}{hint}")
        _check_dtype("exp_avg_sqs", i, lists["exp_avg_sqs"][i], exp_avg.dtype)
        _check_dtype("steps", i, lists["steps"][i], torch.float32)


def _check_dtype(name: str, i: int, tensor: Tensor, wanted: torch.dtype) -> None:
    if tensor.dtype != wanted:
        raise ValueError(f"{name}[{i}] must be {wanted}, not {tensor.dtype}")


def _check_optional(
    lists: dict[str, Sequence], names: list[str], places: list[tuple[torch.Size, torch.device]]
) -> None:
    if (_SCALES[0] in names) != (_SCALES[1] in names):
        raise ValueError("exp_avg_scales and exp_avg_sq_scales come together: uint8 states have both, others neither")
    if _SCALES[0] in names and "max_exp_avg_sqs" in names:
        raise ValueError(
            "amsgrad needs float32 or bfloat16 states: a maximum of 8-bit numbers would be one of rounding errors"
        )
    for name in names:
        wanted = places
        if name in _SCALES:
            wanted = [(torch.Size((quantized_state.blocks(shape.numel()),)), device) for shape, device in places]
        tensors = (
            [p if t is None else t for t, p in zip(lists[name], lists["params"], strict=True)]
            if name == "copies"
            else lists[name]
        )
        if [(t.shape, t.device) for t in tensors] != wanted:
            _refuse_place(name, tensors, wanted)
        for i, (tensor, exp_avg) in enumerate(zip(lists[name], lists["exp_avgs"], strict=True)):
            if tensor is not None:
                _check_dtype(name, i, tensor, _DTYPES.get(name, exp_avg.dtype))


def _check_params(lists: dict[str, Sequence], stochastic_rounding: bool) -> None:
    wish = "remainders" if len(lists["remainders"]) else "stochastic_rounding"
    if wish == "remainders" and stochastic_rounding:
        raise ValueError("stochastic_rounding and remainders exclude each other: with its remainder a param is exact")
    for i, param in enumerate(lists["params"]):
        if param.dtype != torch.bfloat16:
            raise ValueError(f"{wish} is for bfloat16 params; params[{i}] is {param.dtype}")
    if any(copy is not None for copy in lists["copies"]):
        raise ValueError(f"copies are for wider params: with {wish} the params are bfloat16 themselves")
