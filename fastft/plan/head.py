"""What the loss over a vocabulary takes, by the chunks of `fastft.ops.linear_cross_entropy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastft.plan.setting import Setting, Tensors


@dataclass(frozen=True)
class Head:
    """The loss over a vocabulary.

    Attributes
    ----------
    logits : int
        A chunk of them, or all, with what is widened to compute them.
    kept : int
        Of that, what is there until the backward.
    gradient_in_loss, gradient : int
        Of the head's weight, while it is summed, and from then on: it comes in the forward.
    gradient_of_hidden : int
    """

    logits: int = 0
    kept: int = 0
    gradient_in_loss: int = 0
    gradient: int = 0
    gradient_of_hidden: int = 0


def head(t: Tensors, tokens: int, s: Setting) -> Head:
    """What the loss takes, by the chunks of `fastft.ops.linear_cross_entropy`, or with all logits."""
    if t.head is None:
        return Head()
    from fastft.ops import linear_cross_entropy_plan  # torch comes with it

    rows, columns = t.head
    element = s.element
    gradient = rows * columns * element if t.head_trained else 0
    if not s.fused_loss:
        return Head(tokens * rows * element, tokens * rows * element)
    of_hidden = tokens * columns * element
    computed = 4 if s.widens else element
    wide_sum = 4 * rows * columns if t.head_trained and computed == 2 else 0
    if s.device == "cuda":
        chunks = linear_cross_entropy_plan.by_model(tokens, rows, columns, computed, True, t.head_trained, 132)
    else:
        chunks = linear_cross_entropy_plan.by_bytes(tokens, rows, computed, None, wide_sum)
    logits = min(chunks.size, tokens) * rows * computed
    summed = gradient
    if wide_sum and not chunks.parked and len(chunks.chunks(tokens)) > 1:
        summed = wide_sum
    if s.widens:
        summed *= 2  # the sum is float32, and is rounded beside it at the end
        logits += 4 * rows * columns + 2 * 4 * tokens * columns
        summed += gradient
    return Head(logits, 0, summed, gradient, of_hidden)
