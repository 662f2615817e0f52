"""Rows through a model to see what its linear layers are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastft.models.trial import trial

TOKENS = 4096  # of a layer's inputs that are held in float32 at once


class _Enough(Exception):
    """Nothing of the rest of the forward is needed."""


def walk(
    model: Any,
    inputs: Mapping[str, Any],
    layers: Mapping[str, torch.nn.Linear],
    visit: Callable[[str, torch.Tensor], None],
) -> list[str]:
    """Run the model once, without gradients, and call ``visit`` before each layer computes for the first time.

    What ``visit`` does to the layer's weight, the layers behind it see.

    Parameters
    ----------
    inputs : mapping
        Of the model's forward, on its device: all rows at once.
    visit : callable
        Of a layer's name and the second moment of its inputs, (in, in) float32, without padding.

    Returns
    -------
    list of str
        Layers that these rows did not reach.
    """
    left = dict(layers)
    mask = inputs.get("attention_mask")
    last: tuple[Any, torch.Tensor] | None = None  # query, key and value are given the same

    def before(name: str) -> Callable:
        def hook(module: torch.nn.Linear, args: tuple) -> None:
            nonlocal last
            if left.pop(name, None) is None or args[0].numel() == 0:
                return
            if last is None or last[0] is not args[0]:
                last = (args[0], _moment(args[0], mask))
            visit(name, last[1])

        return hook

    def enough(*_: Any) -> None:
        raise _Enough

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hooks = [module.register_forward_pre_hook(before(name)) for name, module in layers.items()]
    hooks += [output.register_forward_pre_hook(enough)] if output is not None else []
    try:
        with trial(model, torch.device("cpu")):
            model(**inputs)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return list(left)


def _moment(x: torch.Tensor, mask: Any) -> torch.Tensor:
    if isinstance(mask, torch.Tensor) and mask.shape == x.shape[:-1]:
        x = x[mask.bool()]
    x = x.reshape(-1, x.shape[-1])
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for part in x.split(TOKENS):
        part = part.float()
        total.addmm_(part.T, part)
    return total.div_(max(1, len(x)))
