"""The loss of an encoder-decoder model's targets."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastft.config import Loss
from fastft.errors import UserError
from fastft.lazy import torch
from fastft.models.load import start_of_decoder, written_rows
from fastft.tasks._language import LanguageModelObjective, sample_inputs
from fastft.tasks.base import Batch


def shift(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder is given for labels, as the model's family makes it.

    Parameters
    ----------
    labels : (rows, width) int64
        Targets, -100 behind them; every row has at least one.

    Returns
    -------
    Tensor
        (rows, width) int64: the labels one position later, behind the token that decoding starts with.

    Raises
    ------
    UserError
        The model's config lacks what that takes.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    of_family: Any = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    try:
        if own is not None:
            return own(labels=labels)
        if of_family is not None:  # M2M100, NLLB-MoE, Blenderbot
            ids = (model.config.pad_token_id, start_of_decoder(model.config))
            return of_family(labels, *ids[: len(inspect.signature(of_family).parameters) - 1])
    except (TypeError, ValueError) as e:
        raise UserError(
            f"{type(model).__name__}: cannot tell what its decoder starts with: {str(e).strip().splitlines()[0][:200]}",
            "Set decoder_start_token_id and pad_token_id in the model's config.json.",
        ) from None
    raise UserError(
        f"{type(model).__name__}: its code does not say how targets become the decoder's inputs.",
        "Choose a model of another family (T5, BART, Marian, mBART, M2M100, Pegasus, LED, ...).",
    )


def sample_pairs(model: Any, length: int, device: torch.device) -> dict[str, Any]:
    """Two pairs of random tokens, to try a model on."""
    tokens = sample_inputs(model, length, device)["input_ids"]
    return {"input_ids": tokens, "decoder_input_ids": tokens.flip(0) % written_rows(model), "use_cache": False}


class Seq2SeqObjective(LanguageModelObjective):
    """Cross-entropy of the targets, over the targets of the whole step."""

    def __init__(self, settings: Loss, forward: Callable, model: torch.nn.Module, sample: dict):
        super().__init__(settings, forward, model, sample)  # type: ignore[arg-type]
        self.model = model

    def _sum(self, model: Callable, batch: Batch, **options: Any) -> torch.Tensor:
        # A dummy batch has no target, of which some families would look for the last.
        labels = batch.labels if batch.samples else torch.zeros_like(batch.labels)
        inputs = {**batch.inputs, "decoder_input_ids": shift(self.model, labels), "use_cache": False}
        return super()._sum(model, replace(batch, inputs=inputs), **options)
