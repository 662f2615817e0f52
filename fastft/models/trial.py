"""Trial forwards on the model at hand, before training: whether it runs on rows as the task pads them, and whether
padding beside a row changes what it says of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastft.errors import UserError
from fastft.models.load import vocabulary_rows

log = logging.getLogger(__name__)

# What model code raises on inputs that it cannot take.
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, NotImplementedError)
SHORT, LONG = 5, 11  # tokens of the rows that are tried


@contextmanager
def trial(model: torch.nn.Module, device: torch.device, training: bool = False) -> Iterator[None]:
    """No gradients, the mode restored, and random numbers of its own: training goes on with those that it would have
    had.
    """
    was_training = model.training
    model.train(training)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        model.train(was_training)


def random_rows(tokenizer: Any, model: torch.nn.Module, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Rows of ordinary tokens, the same at every call."""
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([i for i in range(min(vocabulary_rows(model), 1000)) if i not in special] or [0])
    generator = np.random.default_rng(0)
    return [generator.choice(ordinary, size) for size in sizes]


def check_runs(
    forward: Callable,
    model: torch.nn.Module,
    inputs: Callable[[int], dict],
    width: int,
    limit: int,
    device: torch.device,
) -> None:
    """UserError when the model cannot be run on rows of ``width`` tokens in training.

    ``inputs(width)`` makes them. Where another width works, the message says which multiple to pad to.
    """
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return  # its running statistics would learn from random tokens
    if (reason := _refusal(forward, model, inputs, width, device)) is None:
        return
    multiples = (2**power for power in range(1, 14) if width % 2**power and 2**power <= limit)
    fits = next((m for m in multiples if _refusal(forward, model, inputs, m, device) is None), None)
    raise UserError(
        f"{type(model).__name__} cannot be run on rows of {width} tokens: {reason}",
        f"It can on rows of {fits}: set batch.pad_to_multiple_of: {fits}."
        if fits
        else "Choose another model, or other lengths (data.max_length, batch.pad_to_multiple_of).",
    )


def _refusal(forward: Callable, model: Any, inputs: Callable, width: int, device: torch.device) -> str | None:
    try:
        with trial(model, device, training=True):
            forward(**{name: on_device(value, device) for name, value in inputs(width).items()})
    except REFUSALS as e:
        return (str(e).strip() or type(e).__name__).splitlines()[0][:300]
    return None


def on_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def check_padding(forward: Callable, model: torch.nn.Module, task: Any, device: torch.device) -> None:
    """Try a sequence task's model on a short and a longer row, alone and together.

    Raises UserError when it cannot be run; warns when the short one's logits depend on the padding beside it.
    """
    sizes = (min(SHORT, task.max_length), min(LONG, task.max_length))
    rows = random_rows(task.tokenizer, model, sizes)

    def inputs(width: int) -> dict:
        return task.padded_inputs([np.resize(rows[0], width)], None)

    check_runs(forward, model, inputs, sizes[0], task.max_length, device)

    def logits(*some: np.ndarray) -> torch.Tensor:
        given = task.padded_inputs(list(some), None)
        with trial(model, device):
            return forward(**{name: on_device(value, device) for name, value in given.items()}).logits[0].float()

    alone, together = logits(rows[0]), logits(*rows)
    difference = ((alone - together).abs().max() / alone.abs().max().clamp_min(1e-6)).item()
    if difference > (1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2):
        log.warning(
            "%s: what it says of a text depends on how far it is padded in its batch (logits differ by %.2g of the "
            "largest)",
            type(model).__name__,
            difference,
        )
