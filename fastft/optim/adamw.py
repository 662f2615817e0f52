"""FusedAdamW: AdamW through `fastft.ops.adamw`, interchangeable with torch.optim.AdamW, fit to be DeepSpeed's client optimizer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastft.ops.adamw import adamw, state_dtype


class _Kept:
    """Carries a state tensor past torch.optim.Optimizer.load_state_dict, which would cast it to the param's dtype."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), or Adam with L2 when adam_w_mode is False; the rules are torch.optim.AdamW's.

    params        tensors or parameter groups, float32 or bfloat16 (float16, float64: reference backend only), on any devices.
    lr            float, or a 0-dim tensor.
    backend       see fastft.ops.backends; None chooses by itself.

    State per param: step (0-dim float32 on the param's device), exp_avg, exp_avg_sq, with amsgrad also max_exp_avg_sq, in float32
    also for bfloat16 params. state_dict() loads into torch.optim.AdamW, and its loads here.

    For DeepSpeed: nothing is remembered between calls except `self.state`, so groups and their params may be swapped or emptied.
    FP16_UnfusedOptimizer (stage 0 with bfloat16 or float16) calls step() once on zero gradients while it is built, which would
    count a step and decay the weights; build the engine inside `with optimizer.steps_suspended():`.

    Raises ValueError for arguments out of range.
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
        backend: str | None = None,
    ):
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not 0.0 <= lr:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= eps:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not 0.0 <= weight_decay:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        self.backend = backend
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

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """One update of every param that has a gradient; returns what `closure` returned.

        grad_scale  0-dim float32: gradients are multiplied by it (torch's GradScaler, which divides, does its own unscaling).
        found_inf   0-dim float32: when it is not 0 params, state and steps stay as they are.

        Raises RuntimeError for sparse or complex gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._suspended:
            return loss
        outer_scale, outer_inf = self._scaling
        for group in self.param_groups:
            self._step_group(group, outer_scale if grad_scale is None else grad_scale, outer_inf if found_inf is None else found_inf)
        return loss

    @contextmanager
    def scaled(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Iterator[None]:
        """While inside, step() uses these unless it is given its own: for wrappers (DeepSpeed's engine) that call it without arguments."""
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

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            if param.grad.layout != torch.strided:
                raise RuntimeError("FusedAdamW does not support sparse gradients, please consider SparseAdam instead")
            if param.is_complex():
                raise RuntimeError("FusedAdamW does not support complex parameters")
        if not params:
            return
        states = [self._state_of(param, group["amsgrad"]) for param in params]
        steps = [state["step"] for state in states]
        self._update(group, params, [param.grad for param in params], states, steps, grad_scale=grad_scale, found_inf=found_inf)

    @torch.no_grad()
    def step_flat(
        self, group: dict[str, Any], param: Tensor, grads: list[Tensor], *, out: Tensor | None = None, grad_scale: Tensor | None = None
    ) -> None:
        """One update of a flat param whose gradient lies in pieces, for wrappers that shard (fastft.optim.zero_step).

        group       the param's group; its params are not looked at.
        param       (n,) float32 or bfloat16.
        grads       1-D tensors that cover param from its first element on, one after the other; what they leave (padding) stays as it is.
        out         (n,): receives the updated param in out's dtype; with bfloat16 in the same pass over memory.
        grad_scale  0-dim float32: gradients are multiplied by it.
        """
        if self._suspended:
            return
        state = self._state_of(param, group["amsgrad"])
        sizes = [grad.numel() for grad in grads]
        rest = param.numel() - sum(sizes)
        if rest < 0:
            raise ValueError(f"gradients of {sum(sizes)} elements for a param of {param.numel()}")

        def cut(tensor: Tensor) -> tuple[Tensor, ...]:
            return tensor.split([*sizes, rest])[: len(sizes)]

        moments = {name: cut(value) for name, value in state.items() if name != "step"}
        pieces = [{name: values[i] for name, values in moments.items()} for i in range(len(sizes))]
        steps = state["step"].repeat(len(sizes)).unbind()  # the op counts one step per tensor it is given
        fused_out = out is not None and out.dtype == torch.bfloat16
        copies = cut(out) if fused_out else None
        self._update(group, cut(param), grads, pieces, steps, copies=copies, grad_scale=grad_scale)
        state["step"] += 1
        if out is not None and not fused_out:
            out.copy_(param)

    def _update(self, group: dict[str, Any], params, grads, states, steps, **given) -> None:
        """fastft.ops.adamw with a group's settings."""
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            steps,
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
            dtype = state_dtype(param.dtype)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            if amsgrad:
                state["max_exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.Adam(W). The state stays (or becomes) float32, whatever the params are.

        Like torch's, it does not copy tensors that already have the right device and dtype.
        """
        # As a hook, and the last one, so that the caller's own hooks see and return plain tensors.
        handle = self.register_load_state_dict_pre_hook(_wrap_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend, "_suspended": self._suspended, "_scaling": self._scaling}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            group.setdefault("decoupled_weight_decay", True)
        for param, values in self.state.items():
            for name, value in values.items() if isinstance(values, dict) else ():
                values[name] = _restored(name, value, param)


def _wrap_state(_optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {name: _Kept(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if isinstance(values, dict)
        else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _restored(name: str, value: Any, param: Any) -> Any:
    """A loaded state value where and in the dtype that step() wants it."""
    tensor = value.tensor if isinstance(value, _Kept) else value
    if not isinstance(param, Tensor):
        return tensor
    if name == "step":  # a plain number in old checkpoints, on the host in torch's
        return torch.as_tensor(tensor, dtype=torch.float32, device=param.device)
    if isinstance(value, _Kept) and tensor.is_floating_point():
        return tensor.to(device=param.device, dtype=state_dtype(param.dtype))
    return tensor
