"""Decoder layers of the user's model as one function each, where they are of that form and it gives the same.

A layer is matched by its structure, never by its name; what decides is a comparison on the model's own weights: output
and every gradient of the fused function must be as near to float32 arithmetic as the plain layer's are. The module
stays what it is (parameters, names, hooks of its parent). Only its ``forward`` is another one, which takes the fused
function where a forward of the model says where documents begin.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastft.models.documents import ByDocument, packed_inputs, probe_length
from fastft.models.parts import epsilon, norm_forward
from fastft.models.trial import REFUSALS, trial
from fastft.ops.cpu import widens
from fastft.ops.decoder import WEIGHTS, Documents, Shape, decoder_layer

PARTS = {
    "norm1": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight",
    "norm2": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
CHILDREN = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
ALLOWED = 2.0  # times the plain layer's own error


@dataclass(frozen=True)
class Match:
    """A layer of the form of `fastft.ops.decoder`."""

    layer: Any
    shape: Shape


# Of such a layer, in the order of WEIGHTS.
weights_of: Callable[[Any], tuple] = operator.attrgetter(*(PARTS[name] for name in WEIGHTS))


def match(layer: Any) -> Match | str:
    """The layer's form, or why it is another one."""
    for name, expected in CHILDREN.items():
        part = layer.get_submodule(name)
        names = {child for child, module in part.named_children() if not _is_activation(module)}
        if names != expected:
            odd = sorted(names ^ expected)[0]
            return f"{name + '.' if name else ''}{odd} is {'not there' if odd in expected else 'not known'}"
    a = layer.self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        if type(getattr(a, name)) is not nn.Linear:
            return f"self_attn.{name} is a {type(getattr(a, name)).__module__}.{type(getattr(a, name)).__name__}"
    for name in CHILDREN["mlp"]:
        if type(module := getattr(layer.mlp, name)) is not nn.Linear or module.bias is not None:
            return f"mlp.{name} is a {type(module).__name__}, or has a bias"
    if a.o_proj.bias is not None:
        return "self_attn.o_proj has a bias"
    if len({a.q_proj.bias is None, a.k_proj.bias is None, a.v_proj.bias is None}) > 1:
        return "some of query, key and value have a bias"
    norms = layer.input_layernorm, layer.post_attention_layernorm
    eps = [epsilon(norm) for norm in norms]
    if eps[0] is None or eps[0] != eps[1]:
        return f"its {type(norms[0]).__name__} is not the RMS norm that is known"
    config, dim = getattr(a, "config", None), getattr(a, "head_dim", None)
    if config is None or dim is None or dim % 2:
        return f"{type(a).__name__} does not say the size of its heads"
    if getattr(a, "attention_dropout", 0.0):
        return "its attention has dropout"
    own = [p.dtype for p in layer.parameters()]
    if len(set(own)) != 1:
        return "its weights are of several dtypes"
    heads, groups = a.q_proj.out_features // dim, a.k_proj.out_features // dim
    shape = Shape(heads, groups, dim, float(getattr(a, "scaling", dim**-0.5)), float(eps[0]), _window(a, config))
    return Match(layer, shape)


def _window(attention: Any, config: Any) -> int | None:
    """Tokens that each token sees, where a layer's attention is a sliding window."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[attention.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _is_activation(module: nn.Module) -> bool:
    return not any(True for _ in module.parameters()) and not any(True for _ in module.children())


def install(forward: Callable, model: Any, documents: ByDocument, length: int, device: torch.device) -> str:
    """Give the model's decoder layers, and the norm after them, the fused forward where that is proven.

    Parameters
    ----------
    forward : callable
        The model, or the engine around it, on ``device``.
    documents : ByDocument
        Installed in the model: what tells layers where documents begin.
    length : int
        Tokens of the longest row in training.

    Returns
    -------
    str
        What was done, one sentence for the record.
    """
    layers = [m for m in model.modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]
    if not layers:
        return "plain: no layers of the known form"
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return "plain: ZeRO 3 gathers the weights of a layer's modules as these are called"
    matches = []
    for layer in layers:
        found = match(layer)
        if isinstance(found, str):
            return f"plain: {type(layer).__name__}: {found}"
        matches.append(found)
    if len({type(m.layer) for m in matches}) > 1:
        return "plain: layers of several classes"
    try:
        seen, bounds, longest = _inputs_of(matches, forward, model, documents, length, device)
        for found, given in zip(matches, seen, strict=True):  # all: a model may treat each its own way
            if reason := _differs(found, given, bounds, longest, documents):
                return f"plain: {type(found.layer).__name__} {layers.index(found.layer)}: {reason}"
    except REFUSALS as error:
        return f"plain: {(str(error).strip() or type(error).__name__).splitlines()[0][:300]}"
    for found in matches:
        _lay_side_by_side(found.layer)
        found.layer.forward = types.MethodType(_forward_of(found.shape), found.layer)
    if device.type == "cuda":  # on a CPU it gains nothing, and other forwards keep their bits
        kind = type(matches[0].layer.input_layernorm)
        inside = {id(m) for layer in layers for m in layer.modules()}
        for norm in (m for m in model.modules() if type(m) is kind and id(m) not in inside):
            norm.forward = types.MethodType(norm_forward, norm)
    return f"fused: {len(matches)} layers of {type(matches[0].layer).__name__}"


def _lay_side_by_side(layer: Any) -> None:
    """Weights that are multiplied by the same input become parts of one tensor, so that it is one product; where ZeRO
    keeps them in its own flat tensor, they are already.
    """
    a, m = layer.self_attn, layer.mlp
    for modules in ((a.q_proj, a.k_proj, a.v_proj), (m.gate_proj, m.up_proj)):
        for name in ("weight", "bias"):
            parts = [getattr(module, name) for module in modules]
            if parts[0] is None or any(p.untyped_storage().nbytes() != p.nbytes for p in parts):
                continue
            if len({id(p) for p in parts}) < len(parts):
                continue
            whole = torch.cat([p.data for p in parts])
            for p, part in zip(parts, whole.split([len(p) for p in parts]), strict=True):
                p.data = part


def _forward_of(shape: Shape) -> Callable:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        bounds, rotation = kwargs.get("cu_seq_lens_q"), kwargs.get("position_embeddings")
        other = args or any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values", "cache"))
        if bounds is None or rotation is None or other or _watched(self):
            return type(self).forward(self, hidden_states, *args, **kwargs)
        given = shape, hidden_states, bounds, kwargs["max_length_q"], rotation, weights_of(self)
        # transformers checkpoints in its class's forward, in whose place this one is (older ones in __call__).
        again = getattr(self, "gradient_checkpointing", False) and type(self).__call__ is nn.Module.__call__
        if again and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(_fused, *given)
        return _fused(*given)

    return forward


def _watched(layer: nn.Module) -> bool:
    """Whether a module inside has hooks, which the fused function would not call."""
    return any(m is not layer and (m._forward_hooks or m._forward_pre_hooks) for m in layer.modules())


def _fused(shape: Shape, x: Tensor, bounds: Tensor, longest: int, rotation: Any, weights: tuple) -> Tensor:
    cos, sin = (t.flatten(0, -2) for t in rotation)
    if cos.shape[-1] != shape.dim:
        raise ValueError(f"its rotation is of {cos.shape[-1]} elements, its heads have {shape.dim}")
    return decoder_layer(x, Documents(bounds, longest, cos, sin), shape, weights)


def _inputs_of(
    matches: list[Match], forward: Callable, model: Any, documents: ByDocument, length: int, device: torch.device
) -> tuple[list[dict[str, Any]], Tensor, int]:
    """What each layer is given in a plain forward of packed documents, by name, and the documents' bounds."""
    seen: list[dict[str, Any]] = [{} for _ in matches]
    hooks = []
    for found, given in zip(matches, seen, strict=True):
        names = list(inspect.signature(found.layer.forward).parameters)

        def watch(module: nn.Module, args: tuple, kwargs: dict, names: list[str] = names, given: dict = given) -> None:
            given.clear()
            given.update(zip(names, args, strict=False))
            given.update(kwargs)

        hooks.append(found.layer.register_forward_pre_hook(watch, with_kwargs=True))
    inputs = packed_inputs(model, probe_length(model, length), device)
    try:
        with trial(model, device):
            forward(**inputs)
            bounds, longest = seen[0].get("cu_seq_lens_q"), seen[0].get("max_length_q")
            if bounds is None or longest is None:
                raise ValueError("layers are not told where documents begin")
            with documents.off():
                forward(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, bounds, longest


def _differs(found: Match, seen: dict[str, Any], bounds: Tensor, longest: int, documents: ByDocument) -> str:
    """Why the fused layer is not the plain one; "" where its errors are no larger.

    Where the fused layer computes bf16 in float32, the errors that it is held to are those of rounding once.
    """
    x, rotation = seen["hidden_states"].detach(), seen.get("position_embeddings")
    if rotation is None:
        return "it is not given the rotation of its heads"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).to(x)  # an embedding alone is small
    x = x + noise * x.float().std().clamp_min(0.02).to(x.dtype)
    dout = torch.randn(x.shape, generator=generator).to(x)
    parameters = {name: p.detach() for name, p in found.layer.named_parameters()}

    def gradients(dtype: torch.dtype, run: Callable) -> list[Tensor]:
        given = x.to(dtype).requires_grad_()
        weights = {name: p.to(dtype, copy=True).requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            out = run(given, weights)
            if not isinstance(out, Tensor):
                raise ValueError("it returns more than hidden states")
            return [out.detach(), *torch.autograd.grad(out, [given, *weights.values()], dout.to(dtype))]

    def plain(given: Tensor, weights: dict[str, Tensor]) -> Any:
        moved = {name: _as(value, given.dtype) for name, value in seen.items() if name != "hidden_states"}
        with documents.off():
            return functional_call(found.layer, weights, (given,), moved)

    def fused(given: Tensor, weights: dict[str, Tensor]) -> Tensor:
        ordered = tuple(weights.get(PARTS[name]) for name in WEIGHTS)
        return _fused(found.shape, given, bounds, longest, rotation, ordered)

    # Where bf16 is computed in float32, plain layers in bf16 would take minutes, and the results are to be better.
    wide = widens(x)
    computed = torch.float32 if wide else x.dtype
    if _draws(found.layer, x.to(computed), plain, {name: p.to(computed) for name, p in parameters.items()}):
        return "it draws random numbers in training"
    names = ("output", "input", *parameters)
    training = found.layer.training
    found.layer.eval()  # in training it may be run twice, to keep fewer activations
    try:
        truth = gradients(torch.float32, plain)
        own = [t.to(x.dtype) for t in truth] if wide else gradients(x.dtype, plain)
        ours = gradients(x.dtype, fused)
        reason = _larger(names, truth, own, ours)
        if reason and x.dtype == torch.float32:  # the plain layer is off, too: sums that nearly cancel
            reason = _larger(names, gradients(torch.float64, plain), own, ours)
    finally:
        found.layer.train(training)
    return reason


def _larger(names: tuple[str, ...], truth: list[Tensor], own: list[Tensor], ours: list[Tensor]) -> str:
    """Which of our results has errors that the plain layer's do not have; "": none."""
    for name, exact, one, other in zip(names, truth, own, ours, strict=True):
        norm = exact.norm().clamp_min(1e-12)
        errors = [((t.to(exact.dtype) - exact).norm() / norm).item() for t in (one, other)]
        if not errors[1] <= ALLOWED * errors[0] + (1e-5 if other.dtype == torch.float32 else 2e-3):
            return f"{name}: an error of {errors[1]:.2g} where the plain layer has {errors[0]:.2g}"
    return ""


def _draws(layer: nn.Module, x: Tensor, plain: Callable, parameters: dict[str, Tensor]) -> bool:
    """Whether two forwards in training mode differ: dropout, wherever it is."""
    training = layer.training
    layer.train()
    try:
        with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            outs = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                outs.append(plain(x, parameters))
        return not torch.equal(*outs)
    finally:
        layer.train(training)


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_as(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
