"""Attention by document as an attention implementation of transformers: packed documents without the mask that keeps
them apart, and without the work that it would hide.

A batch says where its documents begin (``cu_seq_lens_q``, ``max_length_q``: the names that transformers' models hand
through to their attention). A forward without documents, of a generation or of logits, runs as before: the
implementation is chosen forward by forward. That the model's logits are the same both ways is measured on the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastft.models.load import vocabulary_rows
from fastft.models.switch import Switch, proven, refuse
from fastft.models.trial import trial
from fastft.ops.decoder.attention import DocumentAttention, kernels, refuses, slow

NAME = "fastft_varlen"
SHORT = 64  # tokens of a row that is enough where there is no window
MASKS = ("attention_mask", "past_key_values", "cache", "inputs_embeds")  # with one of them, rows are not packed


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, heads, S, dim), key and value (B, groups, S, dim); the result
    (B, S, heads, dim).

    Raises ValueError for what it cannot compute: dropout, a cap on the logits, attention sinks, an encoder's attention.
    """
    bounds, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
    if bounds is None or longest is None:
        raise ValueError("the model does not hand the documents' bounds to its attention")
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise ValueError(f"its attention has {name}")
    if dropout:
        raise ValueError("its attention has dropout")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise ValueError("its attention is not causal")
    if query.shape[2] != key.shape[2]:
        raise ValueError("queries and keys are of different lengths")
    rows, heads, length, dim = query.shape
    q, k, v = (t.transpose(1, 2).reshape(rows * length, -1, dim) for t in (query, key, value))
    scale = dim**-0.5 if scaling is None else scaling
    out = DocumentAttention.apply(q, k, v, bounds, longest, scale, sliding_window)
    return out.view(rows, length, heads, dim), None


class ByDocument(Switch):
    """A model whose attention is by document where a forward says where documents begin."""

    def __init__(self, model: nn.Module):
        super().__init__(model, NAME, attend)
        self.hooks.append(model.register_forward_pre_hook(self._before, with_kwargs=True))

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        bounds, longest = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("max_length_q", None)
        packed = self.on and kwargs.get("use_cache") is False and all(kwargs.get(name) is None for name in MASKS)
        if packed and bounds is None and kwargs.get("position_ids") is not None:
            bounds, longest = bounds_of(kwargs["input_ids"], kwargs["position_ids"])
        packed = packed and bounds is not None
        self.take(packed)
        if packed:
            kwargs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            kwargs |= {"max_length_q": longest, "max_length_k": longest}
        return args, kwargs


def bounds_of(tokens: Tensor, positions: Tensor) -> tuple[Tensor, int]:
    """Where documents begin in tokens (B, S), by their positions (B or 1, S), which restart at 0: (documents + 1,)
    int32, and the longest one's tokens. Waits for the device.
    """
    starts = (positions == 0).expand(tokens.shape).clone()
    starts[:, 0] = True
    begin = starts.flatten().nonzero()[:, 0]
    bounds = torch.cat([begin, begin.new_tensor([tokens.numel()])]).to(torch.int32)
    return bounds, int(bounds.diff().max())


def install(
    forward: Callable, model: Any, choice: str, length: int, device: torch.device
) -> tuple[ByDocument | None, str]:
    """Attention by document where it gives the model's own logits, measured on two packed documents.

    Parameters
    ----------
    forward : callable
        The model, or the engine around it, on ``device``.
    choice : str
        model.attention: "varlen", or "auto", which takes it on a GPU, and on a CPU with fastft's kernels.
    length : int
        Tokens of the longest row in training.

    Returns
    -------
    (ByDocument or None, str)
        What was put into the model, and why, or why not.

    Raises
    ------
    UserError
        "varlen" was asked for and cannot be had.
    """
    if choice not in ("auto", "varlen"):
        return None, "asked for"
    if choice == "auto" and (reason := slow(device, next(model.parameters()).dtype)):
        return None, f"automatic: {reason}"
    reason = refused(model, device)
    if not reason:
        installed, dtype = ByDocument(model), next(model.parameters()).dtype

        def found() -> float:
            return difference(installed, forward, model, probe_length(model, length), device)

        reason = proven(installed, found, dtype, "plain attention")
        if not reason:
            by = kernels(query_of(model, device), getattr(model.config.get_text_config(), "num_key_value_heads", 1))
            return installed, f"{'automatic' if choice == 'auto' else 'asked for'}, by {by}"
    refuse(model, choice, reason)
    return None, reason


def refused(model: Any, device: torch.device) -> str:
    """Why a decoder's attention cannot be by document, as far as its config tells; "" where nothing is in the way."""
    config = model.config.get_text_config()
    if not getattr(config, "num_attention_heads", None) or not getattr(config, "hidden_size", None):
        return "its config does not say how many heads it has"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    return refuses(query_of(model, device))


def query_of(model: Any, device: torch.device) -> Tensor:
    """No tokens, the model's heads."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return torch.empty(0, heads, dim, dtype=next(model.parameters()).dtype, device=device)


def difference(installed: Switch, forward: Callable, model: Any, length: int, device: torch.device) -> float:
    """Largest difference of logits, relative to the largest one."""
    inputs = packed_inputs(model, length, device)
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        with trial(model, device, training=True):  # there it may ask for dropout, which is refused
            forward(**packed_inputs(model, min(length, SHORT), device))
    with trial(model, device):
        found = forward(**inputs).logits.float()
        with installed.off():
            expected = forward(**inputs).logits.float()
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def probe_length(model: Any, length: int) -> int:
    """Tokens of a row that shows whether attention is the same, of rows of up to ``length`` in training: more than a
    window where the model has one that those reach.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention")]
    reached = [w for w in windows if isinstance(w, int) and 0 < w < length]
    return max([min(length, SHORT), *(min(length, w + max(w // 2, 16)) for w in reached)])


def packed_inputs(model: Any, length: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a forward of packed random tokens: two rows, each of a short and a longer document; beyond
    512 tokens one row, its second document of nearly all of them.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary_rows(model), (2 if length <= 512 else 1, length), generator=generator).to(device)
    cut = max(min(length // 8, 64), 1)
    positions = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand_as(tokens).to(device)
    return {"input_ids": tokens, "position_ids": positions, "use_cache": False}
