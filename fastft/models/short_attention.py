"""Attention over short texts on a CPU: plain matrix products, which torch's attention is slower than there."""

from __future__ import annotations

from typing import Any

from fastft.lazy import torch

# Tokens. Forward and backward of 32 x 4 heads of 48 on 2 cores (AVX2), fp32, torch 2.13's attention beside products and
# a softmax: 1.3 ms and 0.6 at 12 tokens, 2.2 and 1.4 at 32, 21 and 15 at 128. Beyond, the products' memory counts.
LONGEST = 128


def take(model: Any, choice: str, longest: int, device: torch.device) -> str:
    """Have a model of padded batches take transformers' eager attention where that is faster, and ``choice`` leaves it
    open; one sentence for the record.

    Parameters
    ----------
    model : PreTrainedModel
    choice : str
        ``model.attention``.
    longest : int
        Most tokens of a text.
    """
    own = model.config._attn_implementation
    if choice != "auto" or own != "sdpa" or device.type != "cpu" or longest > LONGEST or model.dtype != torch.float32:
        return own
    model.set_attn_implementation("eager")
    return f"eager: no text is longer than {LONGEST} tokens"
