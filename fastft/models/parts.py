"""Norms and gated MLPs of the user's model by fused kernels, one module at a time: for layers that are not fused whole
(with LoRA, or of another form). Each is tried on its own weights first; only its ``forward`` is another one afterwards.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastft.models.trial import REFUSALS
from fastft.ops.decoder import gated, rms_norm

ROWS = 6  # that a module is tried on
SMALLEST = 256  # columns: a norm of single heads has too little to do in a row
GATED = {"gate_proj", "up_proj", "down_proj"}


def install(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    """Give RMS norms and gated MLPs of a model on ``device`` their fused forwards; one sentence for the record."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return "none at ZeRO 3"
    counts = {"norms": 0, "gated MLPs": 0}
    for module in model.modules():
        if "forward" in vars(module):  # inside a layer that is fused whole, or another's
            continue
        if epsilon(module) is not None:
            columns = module.get_parameter("weight").numel()
            if columns >= SMALLEST and _same(module, norm_forward, columns, dtype, device):
                module.forward = types.MethodType(norm_forward, module)
                counts["norms"] += 1
        elif (columns := _gated_width(module)) and _same(module, _gated_forward, columns, dtype, device):
            module.forward = types.MethodType(_gated_forward, module)
            counts["gated MLPs"] += 1
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def epsilon(module: Any) -> float | None:
    """Of an RMS norm with one weight; None: it is no such module, as far as its structure tells."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = [name for name, _ in module.named_parameters()]
    if not isinstance(eps, float) or "RMSNorm" not in type(module).__name__ or own != ["weight"]:
        return None
    return eps if module.weight.ndim == 1 else None


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Forward of an RMS norm."""
    return rms_norm(hidden_states, self.weight, epsilon(self) or 0.0)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def _gated_width(module: nn.Module) -> int:
    """Columns that a gated MLP takes; 0: it is none."""
    children = dict(module.named_children())
    others = [child for name, child in children.items() if name not in GATED]
    if not children.keys() >= GATED or len(others) != 1 or "SiLU" not in type(others[0]).__name__:
        return 0
    return int(getattr(children["gate_proj"], "in_features", 0))


def _same(module: nn.Module, fused: Callable, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether output and gradients of a random input are those of the module, to the dtype's rounding."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, ROWS, columns, generator=generator) * 3).to(device, dtype)
    grad: Tensor | None = None
    training = module.training
    module.eval()  # no dropout in adapters
    results: list[list[Tensor]] = []
    try:
        for run in (module, lambda given: fused(module, given)):
            given = x.clone().requires_grad_()
            with torch.enable_grad():
                out = run(given)
                if not isinstance(out, Tensor):
                    return False
                grad = torch.randn(out.shape, generator=generator).to(out) if grad is None else grad
                trained = [p for p in module.parameters() if p.requires_grad]
                found = torch.autograd.grad(out, [given, *trained], grad, allow_unused=True)
                results.append([out.detach(), *_given(found)])
    except REFUSALS:
        return False
    finally:
        module.train(training)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    plain, own = results
    return len(plain) == len(own) and all(
        a.dtype == b.dtype and (a.float() - b.float()).norm() <= allowed * a.float().norm() + 1e-12
        for a, b in zip(plain, own, strict=True)
    )


def _given(grads: Iterable[Tensor | None]) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]
