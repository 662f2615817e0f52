"""FusedAdamW: AdamW through `fastft.ops.adamw`, interchangeable with torch.optim.AdamW,
fit to be DeepSpeed's client optimizer.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from fastft.ops.adamw import adamw
from fastft.optim import adamw_state
from fastft.optim.adamw_state import StateDtype

_OFFSET = "_fastft_offset"  # attribute of a param: see set_offset


def set_offset(param: Tensor, offset: int) -> None:
    """Tell FusedAdamW where a shard begins in the whole that it is cut from, in elements:
    rounding then does not depend on the cut.

    Params without an offset are counted through, group by group.
    """
    setattr(param, _OFFSET, offset)


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), or Adam with L2 when adam_w_mode is False; the rules are torch.optim.AdamW's.

    params        tensors or parameter groups, float32 or bfloat16 (float16, float64: reference backend only), on any
                  devices.
    lr            float, or a 0-dim tensor.
    state_dtype   "fp32"; "bf16" and "int8" (codes in blocks of 256) are rounded stochastically. int8 excludes amsgrad.
    stochastic_rounding   bfloat16 params are rounded up or down at random, with the exact mean: no fp32 master is
                needed.
    remainder     bfloat16 params and an int16 state each are the fp32 master together, exactly. Excludes
                  stochastic_rounding. Neither is for wider params: step() raises ValueError.
    seed          of all this rounding, from 0 to 2^63 - 1. The numbers are a function of (seed, step, element) and
                  nothing else; see set_offset.
    backend       see fastft.ops.backends; None chooses by itself.

    Bytes of params and state, read and written once per step with the gradient: fp32 28 per parameter; bfloat16 params
    and gradients with remainder 26, with stochastic rounding 20, and with int8 state 10. Definitions:
    fastft/ops/quantized_state.py.

    State per param: step (0-dim float32 on the param's device), exp_avg, exp_avg_sq, with amsgrad also max_exp_avg_sq,
    in float32 also for bfloat16 params; remainder; with int8 exp_avg_scale and exp_avg_sq_scale. state_dict() loads
    into torch.optim.AdamW, and its loads here: it holds int8 state as float32, which loses nothing, since coding it
    again gives the same codes. So DeepSpeed's checkpoints keep it, universal ones too (those drop the remainder:
    DeepSpeed takes exp_avg, exp_avg_sq and the param only). A state dict of another state_dtype is converted, to
    nearest.

    For DeepSpeed: nothing is remembered between calls except `self.state`, so groups and their params may be swapped or
    emptied. FP16_UnfusedOptimizer (stage 0 with bfloat16 or float16) calls step() once on zero gradients while it is
    built, which would count a step and decay the weights; build the engine inside `with optimizer.steps_suspended():`.

    Raises ValueError for arguments out of range or that exclude each other.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adam_w_mode: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        state_dtype: StateDtype = "fp32",
        stochastic_rounding: bool = False,
        remainder: bool = False,
        seed: int = 0,
        backend: str | None = None,
    ):
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if state_dtype not in get_args(StateDtype):
            raise ValueError(f"Invalid state_dtype: {state_dtype!r}; use one of {', '.join(get_args(StateDtype))}")
        if state_dtype == "int8" and amsgrad:
            raise ValueError("amsgrad and state_dtype='int8' exclude each other: use 'bf16' or 'fp32'")
        if stochastic_rounding and remainder:
            raise ValueError(
                "stochastic_rounding and remainder exclude each other: with its remainder a param is exact"
            )
        if not 0 <= seed < 2**63:
            raise ValueError(f"Invalid seed: {seed}; use 0 to 2^63 - 1")
        self.backend = backend
        self.state_dtype = state_dtype
        self.stochastic_rounding = stochastic_rounding
        self.remainder = remainder
        self.seed = seed
        self._suspended = False
        self._scaling: tuple[Tensor | None, Tensor | None] = (None, None)
        defaults = {
            "lr": lr,
            "betas": tuple(float(beta) for beta in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": adam_w_mode,  # torch's name for it, so that its optimizers read it
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, but for a param twice in a group (ValueError): two threads would update the same memory."""
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):
            param_group["params"] = params = list(params)
            tensors = [p[1] if isinstance(p, tuple) else p for p in params]
            if len({id(p) for p in tensors}) < len(tensors):
                raise ValueError("a parameter group holds the same parameter twice: give each once")
        super().add_param_group(param_group)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """One update of every param that has a gradient; returns what `closure` returned.

        grad_scale  0-dim float32: gradients are multiplied by it (torch's GradScaler, which divides, does its own
                    unscaling).
        found_inf   0-dim float32: when it is not 0 params, state and steps stay as they are.

        Raises RuntimeError for sparse or complex gradients.
        """
        if _is_watched(self):
            given: dict[str, Any] = {
                name: value
                for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf))
                if value is not None
            }
            return _watched_step(self, *(() if closure is None else (closure,)), **given)
        return self._step(closure, grad_scale=grad_scale, found_inf=found_inf)

    # torch would wrap step itself for its profiler and its hooks. Where nobody uses them, that costs 0.1 ms after a
    # large step, with cold caches.
    step.hooked = True  # type: ignore[attr-defined]  # what torch looks for

    def _step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._suspended:
            return loss
        outer_scale, outer_inf = self._scaling
        first = 0
        for group in self.param_groups:
            self._step_group(
                group,
                first,
                outer_scale if grad_scale is None else grad_scale,
                outer_inf if found_inf is None else found_inf,
            )
            if self._rounds:
                first += sum(param.numel() for param in group["params"])
        return loss

    @contextmanager
    def scaled(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Iterator[None]:
        """While inside, step() uses these unless it is given its own:
        for wrappers (DeepSpeed's engine) that call it without arguments.
        """
        before, self._scaling = self._scaling, (grad_scale, found_inf)
        try:
            yield
        finally:
            self._scaling = before

    @contextmanager
    def steps_suspended(self) -> Iterator[None]:
        """While inside, step() changes nothing and creates no state: for wrappers that call it on made-up gradients."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    @property
    def _rounds(self) -> bool:
        return self.stochastic_rounding or self.state_dtype != "fp32"

    def _step_group(
        self, group: dict[str, Any], first: int, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """first: offset of the group's first param."""
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            if param.grad.layout != torch.strided:
                raise RuntimeError("FusedAdamW does not support sparse gradients, please consider SparseAdam instead")
            if param.is_complex():
                raise RuntimeError("FusedAdamW does not support complex parameters")
        if not params:
            return
        offsets = _offsets(group["params"], first) if self._rounds else None
        # With masters in bfloat16, params that a model keeps in float32 are their own masters.
        apart = self.remainder or self.stochastic_rounding
        if apart and all(p.dtype != torch.bfloat16 for other in self.param_groups for p in other["params"]):
            wish = "remainder" if self.remainder else "stochastic_rounding"
            raise ValueError(f"{wish} is for bfloat16 params; there is none")
        for half in (True, False) if apart else (None,):
            chosen = [i for i, p in enumerate(params) if half is None or (p.dtype == torch.bfloat16) == half]
            if not chosen:
                continue
            part = [params[i] for i in chosen]
            states = [self._state_of(param, group["amsgrad"]) for param in part]
            self._update(
                group,
                part,
                [param.grad for param in part],
                states,
                [state["step"] for state in states],
                [offsets[i] for i in chosen] if offsets is not None else None,
                grad_scale=grad_scale,
                found_inf=found_inf,
            )

    @torch.no_grad()
    def step_flat(
        self,
        group: dict[str, Any],
        param: Tensor,
        grads: list[Tensor],
        *,
        out: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """One update of a flat param whose gradient lies in pieces, for wrappers that shard (fastft.optim.zero_step).

        group       the param's group; its params are not looked at.
        param       (n,) float32 or bfloat16.
        grads       1-D tensors that cover param from its first element on, one after the other; what they leave
                    (padding) stays as it is.
        out         (n,): receives the updated param in out's dtype; with bfloat16 in the same pass over memory.
        grad_scale  0-dim float32: gradients are multiplied by it.
        """
        if self._suspended:
            return
        state = self._state_of(param, group["amsgrad"])
        rest = param.numel() - sum(grad.numel() for grad in grads)
        if rest < 0:
            raise ValueError(f"gradients of {param.numel() - rest} elements for a param of {param.numel()}")
        if self.state_dtype == "int8" and (len(grads) > 1 or rest):  # its blocks of 256 do not end where the pieces do
            grads, rest = [torch.cat([*grads, grads[0].new_zeros(rest)])], 0
        sizes = [grad.numel() for grad in grads]

        def cut(tensor: Tensor) -> tuple[Tensor, ...]:
            return tensor.split([*sizes, rest])[: len(sizes)]

        states = [dict(state)] if len(sizes) == 1 and not rest else [{} for _ in sizes]
        for name, value in state.items() if len(sizes) > 1 or rest else ():
            for piece, part in zip(states, cut(value) if value.ndim else [value] * len(sizes), strict=True):
                piece[name] = part
        steps = state["step"].repeat(len(sizes)).unbind()  # the op counts one step per tensor it is given
        offsets = list(itertools.accumulate(sizes[:-1], initial=getattr(param, _OFFSET, 0))) if self._rounds else None
        copies = cut(out) if out is not None and out.dtype == torch.bfloat16 else None
        self._update(group, cut(param), grads, states, steps, offsets, copies=copies, grad_scale=grad_scale)
        state["step"] += 1
        if out is not None and copies is None:
            out.copy_(param)

    def _update(self, group: dict[str, Any], params, grads, states, steps, offsets, **given) -> None:
        """fastft.ops.adamw with a group's settings."""
        coded = self.state_dtype == "int8"
        half = params[0].dtype == torch.bfloat16
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            steps,
            remainders=[state["remainder"] for state in states] if self.remainder and half else None,
            exp_avg_scales=[state["exp_avg_scale"] for state in states] if coded else None,
            exp_avg_sq_scales=[state["exp_avg_sq_scale"] for state in states] if coded else None,
            stochastic_rounding=self.stochastic_rounding and half,
            seed=self.seed,
            offsets=offsets,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            backend=self.backend,
            **given,
        )

    def _state_of(self, param: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        state = self.state[param]
        # Not `param not in self.state`: DeepSpeed puts empty dicts there.
        if len(state) == 0:
            adamw_state.fill(state, param, amsgrad=amsgrad, remainder=self._keeps_remainder(param))
        # Also later: DeepSpeed puts float32 there from a universal checkpoint.
        if state["exp_avg"].dtype is not self._stored(param) or ("remainder" in state) != self._keeps_remainder(param):
            self._fit(param, state)
        return state

    def _stored(self, param: Tensor) -> torch.dtype:
        return adamw_state.stored_dtype(self.state_dtype, param)

    def _fit(self, param: Tensor, state: adamw_state.State) -> None:
        """Give the state of one param the dtypes of this optimizer."""
        adamw_state.convert(state, param, self._stored(param), remainder=self._keeps_remainder(param))

    def _keeps_remainder(self, param: Tensor) -> bool:
        return self.remainder and param.dtype == torch.bfloat16

    def state_dict(self) -> dict[str, Any]:
        """As torch's; int8 state as the float32 that it encodes."""
        state_dict = super().state_dict()
        if self.state_dtype == "int8":
            state_dict["state"] = {key: adamw_state.decoded_state(value) for key, value in state_dict["state"].items()}
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.Adam(W).

        The state gets this optimizer's state_dtype, whatever the params are.

        Like torch's, it does not copy tensors that already have the right device and dtype.
        """
        # As a hook, and the last one, so that the caller's own hooks see and return plain tensors.
        handle = self.register_load_state_dict_pre_hook(adamw_state.keep_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            group.setdefault("decoupled_weight_decay", True)
        for param, values in self.state.items():
            if not isinstance(values, dict):
                continue
            for name, value in values.items():
                values[name] = adamw_state.restored(name, value, param)
            if isinstance(param, Tensor) and "exp_avg" in values:
                # Of another dtype as it comes back from torch.optim.AdamW.
                if "remainder" in values and values["remainder"].dtype != torch.int16:
                    del values["remainder"]
                self._fit(param, values)


_ATTRIBUTES = ("backend", "state_dtype", "stochastic_rounding", "remainder", "seed", "_suspended", "_scaling")


def _offsets(params: list[Tensor], first: int) -> list[int]:
    """Of the params that have a gradient."""
    starts = itertools.accumulate((param.numel() for param in params), initial=first)
    return [
        getattr(param, _OFFSET, start) for param, start in zip(params, starts, strict=False) if param.grad is not None
    ]


_watched_step = torch_optimizer.Optimizer.profile_hook_step(FusedAdamW._step)


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a profiler or a step hook wants to know of this step. A subclass's own step is wrapped by torch."""
    return type(optimizer).step is FusedAdamW.step and bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or (not torch.compiler.is_compiling() and torch._C._autograd._profiler_enabled())
    )
