"""Rows through a model to see what its linear layers are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastft import mapped
from fastft.models.gptq import Inputs
from fastft.models.trial import trial

TOKENS = 4096  # of a layer's inputs that are held in float32 at once
Residuals = dict[str, tuple[nn.Module, int]]  # of a layer: the norm, and 0: the norm's input, 1: its output


class _Enough(Exception):
    """Nothing of the rest of the forward is needed."""


def walk(
    model: Any,
    inputs: Mapping[str, Any],
    layers: Mapping[str, nn.Linear],
    visit: Callable[[str, list[Inputs]], None],
    real: Tensor | None = None,
) -> list[str]:
    """Run the model once, without gradients, and call ``visit`` before each layer computes.

    What ``visit`` does to the layer's weight, the layers behind it see. Each row goes through the model twice, the
    second time with the weights as they are before any visit: a visit also learns what the plain model gives the layer.

    Parameters
    ----------
    inputs : mapping
        Of the model's forward, on its device: all rows at once.
    visit : callable
        Of a layer's name and what is known of its inputs over each half of the rows.
    real : Tensor, optional
        (rows, tokens) bool: which are no padding; else by a mask of this shape among the inputs.

    Returns
    -------
    list of str
        Layers without a visit: these rows do not reach them, or the model calls them several times.
    """
    rows = _Rows(inputs, real)
    sums, often = residuals(model, rows.first, layers)
    left = {name: layer for name, layer in layers.items() if name not in often}
    last: tuple[Any, list[Inputs]] | None = None  # query, key and value are given the same
    passed: dict[torch.Size, tuple[nn.Module, Tensor, Tensor]] = {}  # by shape, the last norm, its input and output

    def known(name: str, x: Tensor) -> list[Inputs]:
        nonlocal last
        if name in sums:
            norm, which = sums[name]
            return rows.halves(x, *(pair[which] for last_norm, *pair in passed.values() if last_norm is norm))
        if last is None or last[0] is not x:
            last = (x, rows.halves(x))
        return last[1]

    def forward(name: str, layer: nn.Linear) -> Callable:
        def compute(x: Tensor) -> Tensor:
            if x.numel() == 0 or left.pop(name, None) is None:
                return linear(x, layer.weight, layer.bias)
            plain = layer.weight.data
            visit(name, known(name, x))
            if rows.paired(x):
                own, other = x.chunk(2)
                out = torch.cat([linear(own, layer.weight, layer.bias), linear(other, plain, layer.bias)])
            else:
                out = linear(x, layer.weight, layer.bias)
            if layer.weight.data_ptr() != plain.data_ptr():
                mapped.let_go(plain)
            return out

        return compute

    def after(norm: nn.Module, args: tuple, out: Tensor) -> None:
        passed[args[0].shape] = (norm, args[0], out)

    hooks = [norm.register_forward_hook(after) for norm in {norm for norm, _ in sums.values()}]
    for name, layer in layers.items():
        layer.forward = forward(name, layer)  # type: ignore[method-assign]
    try:
        _run(model, rows.twice)
    finally:
        for layer in layers.values():
            del layer.forward  # the class's own again
        for hook in hooks:
            hook.remove()
    return [*left, *often]


def residuals(
    model: Any, inputs: Mapping[str, Any], layers: Mapping[str, nn.Linear]
) -> tuple[Residuals, dict[str, nn.Linear]]:
    """Layers whose output is added to what a norm before them was given, or put out, so that the next norm is given
    the sum: to the last bit, in a forward of ``inputs``. And those that it calls several times.
    """
    found: Residuals = {}
    calls: Counter[str] = Counter()
    before: dict[torch.Size, tuple[nn.Module, Tensor, Tensor]] = {}  # by the shape of the norm's input
    since: dict[torch.Size, list[tuple[str, Tensor]]] = {}

    def layer_hook(name: str) -> Callable:
        def after(_: nn.Module, args: tuple, out: Tensor) -> None:
            calls[name] += 1
            if out.shape in before:
                since.setdefault(out.shape, []).append((name, out))

        return after

    def norm_hook(norm: nn.Module, args: tuple, out: Tensor) -> None:
        given = args[0]
        for name, added in since.pop(given.shape, []):
            for which, base in enumerate(before[given.shape][1:]):
                same = base.shape == given.shape and torch.equal(total := base + added, given)
                if same and not torch.equal(total, base):  # zeros are no sign
                    found[name] = (before[given.shape][0], which)
        before[given.shape] = (norm, given, out)

    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm") and not list(m.children())]
    hooks = [norm.register_forward_hook(norm_hook) for norm in norms]
    hooks += [layer.register_forward_hook(layer_hook(name)) for name, layer in layers.items()]
    try:
        _run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    often = {name: layer for name, layer in layers.items() if calls[name] > 1}
    return {name: where for name, where in found.items() if name not in often}, often


def _run(model: Any, inputs: Mapping[str, Any]) -> None:
    """A forward up to the output layer over the vocabulary."""

    def enough(*_: Any) -> None:
        raise _Enough

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hook = output.register_forward_pre_hook(enough) if output is not None else None
    try:
        with trial(model, torch.device("cpu")):
            model(**inputs)
    except _Enough:
        pass
    finally:
        if hook is not None:
            hook.remove()


class _Rows:
    """Rows that go through a model twice at once, and where they are in what its layers are given."""

    def __init__(self, inputs: Mapping[str, Any], real: Tensor | None):
        tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1]
        self.count = max(len(tensor) for tensor in tensors)
        mask = inputs.get("attention_mask") if real is None else real
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.real = 0 if self.mask is None else int(self.mask.sum())
        # what is not of the rows may count them: documents' bounds
        self.two = all(
            len(value) in (1, self.count) if value.dim() > 1 else value.dim() == 0
            for value in inputs.values()
            if isinstance(value, Tensor)
        )
        self.sizes = {2 * self.real, *(2 * tensor.shape[0] * tensor.shape[1] for tensor in tensors)}
        of_rows = {name for name, value in inputs.items() if self.two and self._of_rows(value)}
        self.twice = {name: torch.cat([v, v]) if name in of_rows else v for name, v in inputs.items()}
        self.first = {name: v[:1] if name in of_rows else v for name, v in inputs.items()}

    def _of_rows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 1 and len(value) == self.count

    def paired(self, x: Tensor) -> bool:
        """Whether the second half of ``x`` are the tokens of the first in the plain model: not those that an expert is
        given, say.
        """
        return self.two and (len(x) == 2 * self.count or (x.dim() == 2 and len(x) in self.sizes))

    def halves(self, x: Tensor, residual: Tensor | None = None) -> list[Inputs]:
        """What is known of the inputs, by halves of the rows, without padding."""
        two = self.paired(x)
        tensors = [x] if residual is None or not two or residual.shape[:-1] != x.shape[:-1] else [x, residual]
        flat = [p.reshape(-1, p.shape[-1]) for t in tensors for p in (t.chunk(2) if two else (t,))]
        tokens, rows = len(flat[0]), self.count if two else len(x)
        cut = rows // 2 * (tokens // rows)
        if self.mask is not None and tokens in (self.mask.numel(), self.real):
            cut = int(self.mask[: rows // 2].sum())
            if tokens != self.real:  # padding is still there
                flat = [part[self.mask.flatten()] for part in flat]
        return [_inputs(*(part[:cut] for part in flat)), _inputs(*(part[cut:] for part in flat))]


def _inputs(x: Tensor, p: Tensor | None = None, s: Tensor | None = None, r: Tensor | None = None) -> Inputs:
    """Of inputs x (tokens, in), and s (tokens, out) that outputs are added to; p and r: both in the model as it was."""
    count = max(1, len(x))
    moment = _product(x, None, x).div_(count)
    drift = None if p is None else _product(p, x, x).div_(count)
    return Inputs(len(x), moment, drift, None if r is None else _product(r, s, x).div_(count))


def _product(a: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    """(a - b)ᵀ x in float32."""
    total = torch.zeros(a.shape[1], x.shape[1], device=x.device)
    for i in range(0, len(x), TOKENS):
        part = a[i : i + TOKENS].float()
        part = part if b is None else part - b[i : i + TOKENS].float()
        total.addmm_(part.T, x[i : i + TOKENS].float())
    return total
