"""One AdamW step over lists of tensors, in place.

`decoupled=True` is AdamW (arXiv 1711.05101, algorithm 2), False is Adam with L2 (arXiv 1412.6980). The rules, term by
term, are torch.optim.AdamW's and are in fastft/_C.pyi. How quantized state and parameters are stored is in
fastft/ops/quantized_state.py.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from fastft.ops import adamw_check, adamw_reference, backends, native, triton

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_F32 = torch.float32


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    copies: Sequence[Tensor | None] | None = None,
    remainders: Sequence[Tensor] | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    offsets: Sequence[int] | None = None,
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
    """One step in place: params, exp_avgs, exp_avg_sqs,
    max_exp_avg_sqs, steps, copies, remainders and scales are updated.

    All tensors of one index have one shape. params: float32 or bfloat16 (float16, float64: reference backend only),
    grads likewise, of any mix. Any strides. The arithmetic is float32 whatever is stored.

    exp_avgs, exp_avg_sqs   float32 (float64 for float64 params), or bfloat16, or uint8 codes in blocks of 256
                (`quantized_state.quantize`); the two alike. bfloat16 and uint8 are rounded stochastically: to nearest,
                exp_avg_sq would not move at beta2 = 0.999, because a step changes it by 0.1 % and bfloat16 is 0.4 %
                apart.
    exp_avg_scales, exp_avg_sq_scales   with uint8 states: per param a float32 tensor of (ceil(numel / 256),). No
                amsgrad then.
    max_exp_avg_sqs         empty without amsgrad; in the dtype of exp_avgs; bfloat16 is rounded to nearest, or a
                maximum of random roundings would creep up.
    steps       one float32 0-dim tensor per param, on the param's device: steps done so far; each is incremented.
    copies      None, or per param None or a bfloat16 tensor that receives the updated param, rounded to nearest.
    remainders  None, or one int16 tensor per param, all bfloat16: the param and its remainder are one float32 number
                (`quantized_state.join`), and the param is that number rounded to nearest.
    stochastic_rounding     params, all bfloat16, are rounded up or down at random so that the mean is exact.
    seed, offsets           the random numbers are a function of (seed, step, offset + position in the flat param) and
                nothing else: give each shard its offset in the whole, and the result does not depend on how it is cut.
                0 <= seed < 2^63; default offsets are 0.
    lr          a float, or a 0-dim tensor (so that a captured CUDA graph sees a new value).
    grad_scale  0-dim float32 on the params' device; gradients are multiplied by it (in float32).
    found_inf   0-dim float32 on the params' device; when it is not 0 nothing at all is written.

    Raises ValueError for lists or tensors that do not fit together, RuntimeError for sparse or complex gradients.
    """
    if not len(params):
        return
    extra = (
        max_exp_avg_sqs
        or copies
        or remainders
        or exp_avg_scales
        or exp_avg_sq_scales
        or offsets
        or stochastic_rounding
        or type(lr) is not float
        or not 0 <= seed < 2**63
    )
    recorded = _is_recorded(params, grads)
    everyday = not (extra or recorded) and _is_everyday(
        params, grads, exp_avgs, exp_avg_sqs, steps, grad_scale, found_inf
    )
    if everyday and backends.select("adamw", backend, "cpu", (_F32, _F32)) == "native":
        assert isinstance(lr, float)
        native.adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            (),
            steps,
            (),
            (),
            (),
            (),
            [],
            lr=lr,
            lr_tensor=None,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            grad_scale=grad_scale,
            found_inf=found_inf,
            seed=0,
            stochastic_rounding=False,
        )
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps])
        return
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs,
        "steps": steps,
        "copies": () if copies is None else copies,
        "remainders": () if remainders is None else remainders,
        "exp_avg_scales": () if exp_avg_scales is None else exp_avg_scales,
        "exp_avg_sq_scales": () if exp_avg_sq_scales is None else exp_avg_sq_scales,
        "offsets": () if offsets is None else offsets,
    }
    kinds = adamw_check.check(lists, stochastic_rounding, seed)
    # The dispatcher costs 100 us a call and 3 us a tensor, more than the whole update of small tensors; where nothing
    # records the call (torch.compile, make_fx, fake tensors), it adds nothing to what _apply does.
    run: Callable[..., None] = _op if recorded else _apply
    for device, param_dtype, grad_dtype, members in _groups(lists, kinds):
        chosen = backends.select("adamw", backend, device.type, (param_dtype, grad_dtype))
        lr_tensor = lr.to(device, torch.float32, non_blocking=True).reshape(()) if isinstance(lr, Tensor) else None
        run(
            *members,
            lr_tensor,
            grad_scale.to(device, torch.float32, non_blocking=True) if grad_scale is not None else None,
            found_inf.to(device, torch.float32, non_blocking=True) if found_inf is not None else None,
            seed,
            stochastic_rounding,
            0.0 if lr_tensor is not None else lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            decoupled,
            maximize,
            chosen,
        )


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of exp_avg and exp_avg_sq where no smaller one is asked for: float32, except beside float64 params."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def _is_everyday(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool:
    """Whether all is contiguous float32 on the CPU and fits together: one look at each tensor instead of the lists,
    kinds and groups of the general way.

    A step over a large tensor leaves no Python in the caches: what is saved here is worth 1 % of a step of 32M
    parameters and a third of one of 1M.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(steps):
        return False
    for scalar in (grad_scale, found_inf):
        if scalar is not None and not (scalar.dtype is _F32 and scalar.is_cpu):
            return False
    for p, g, m, v, s in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        if not (
            p.dtype is g.dtype is m.dtype is v.dtype is s.dtype is _F32
            and p.shape == g.shape == m.shape == v.shape
            and p.is_cpu and g.is_cpu and m.is_cpu and v.is_cpu and s.is_cpu and s.ndim == 0
            and g.layout is torch.strided and not g.is_neg()
            and p.is_contiguous() and g.is_contiguous() and m.is_contiguous() and v.is_contiguous()
        ):  # fmt: skip
            return False
    return True


def _is_recorded(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether somebody must see the call as one op: a compiler, a dispatch mode, a tensor that is not plain memory."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return not (_PLAIN.issuperset(map(type, params)) and _PLAIN.issuperset(map(type, grads)))


def _groups(
    lists: dict[str, Sequence], kinds: list[adamw_check.Kind]
) -> Iterator[tuple[torch.device, torch.dtype, torch.dtype, list[list]]]:
    """One kernel call takes one device, one dtype per list, and all copies or none:
    (device, dtypes of param and grad, lists).
    """
    copies = lists["copies"]
    if kinds.count(kinds[0]) == len(kinds) and all(copy is not None for copy in copies):
        yield *kinds[0][:3], [list(values) for values in lists.values()]
        return
    groups: dict[tuple, list[int]] = {}
    for i, kind in enumerate(kinds):
        groups.setdefault((*kind, bool(copies) and copies[i] is not None), []).append(i)
    for key, members in groups.items():
        absent = [name for name, values in lists.items() if not len(values) or (name == "copies" and not key[-1])]
        yield *key[:3], [[] if name in absent else [values[i] for i in members] for name, values in lists.items()]


def _apply(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    remainders: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    offsets: list[int],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: int,
    stochastic_rounding: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    backend: str,
) -> None:
    """One device, one dtype per list.

    Hands the backend tensors of equal, dense layout, through copies where they are not.
    """
    if lr_tensor is not None and lr_tensor.device.type == "cpu":
        lr, lr_tensor = lr_tensor.item(), None
    grads = [grad.resolve_neg() for grad in grads]  # a view may have its sign flipped lazily (torch's negative bit)
    given = (grads, params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, remainders)
    dense: Sequence[list[Tensor]] = given
    if not all(map(Tensor.is_contiguous, chain.from_iterable(given))):
        # Blocks and random numbers go by the position in the flat tensor, so these want it in its own order.
        by_position = bool(offsets) or exp_avgs[0].dtype not in (torch.float32, torch.float64)
        dense = _dense(given, by_position or stochastic_rounding)
    (
        dense_grads,
        dense_params,
        dense_exp_avgs,
        dense_exp_avg_sqs,
        dense_max_exp_avg_sqs,
        dense_copies,
        dense_remainders,
    ) = dense
    backends.implementation("adamw", backend)(
        dense_params,
        dense_grads,
        dense_exp_avgs,
        dense_exp_avg_sqs,
        dense_max_exp_avg_sqs,
        steps,
        dense_copies,
        dense_remainders,
        exp_avg_scales,
        exp_avg_sq_scales,
        offsets,
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
        seed=seed,
        stochastic_rounding=stochastic_rounding,
    )
    written = (
        params,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        copies,
        remainders,
        exp_avg_scales,
        exp_avg_sq_scales,
    )
    if dense is not given:
        with torch.no_grad():
            for tensor, ours in zip(chain.from_iterable(given[1:]), chain.from_iterable(dense[1:]), strict=True):
                if ours is not tensor:
                    tensor.copy_(ours)
    # A kernel writes behind autograd's back; a graph that saved a param must still notice.
    torch.autograd.graph.increment_version(chain.from_iterable(written))


_op = torch.library.custom_op(
    "fastft::adamw",
    _apply,
    mutates_args={
        "params",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "steps",
        "copies",
        "remainders",
        "exp_avg_scales",
        "exp_avg_sq_scales",
    },
)


@_op.register_fake
def _fake(*_):
    return None


def _dense(given: tuple[list[Tensor], ...], by_position: bool) -> list[list[Tensor]]:
    """The lists (grads, params, ...) with dense copies in place of tensors that are not laid out as their param,
    or as the param's layout without gaps.
    """
    dense = [list(tensors) for tensors in given]
    for i, param in enumerate(given[1]):
        if all(tensors[i].is_contiguous() for tensors in given if tensors):
            continue
        layout = torch._prims_common.make_contiguous_strides_for(param.shape) if by_position else _layout(param)
        for tensors in dense:
            if tensors and tensors[i].stride() != layout and tensors[i].numel():
                old = tensors[i]
                tensors[i] = torch.empty_strided(old.shape, layout, dtype=old.dtype, device=old.device).copy_(old)
    return dense


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
