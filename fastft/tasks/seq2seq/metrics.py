"""What is measured of an encoder-decoder model: the loss of its targets, and scores of what it generates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastft.data.encoder import Learned
from fastft.inference.forward import Forward
from fastft.tasks import _judged
from fastft.tasks._generated import Scores
from fastft.tasks.base import IGNORE, SampleMetrics
from fastft.tasks.seq2seq.objective import Seq2SeqObjective


class PairMetrics(SampleMetrics):
    """Loss and perplexity per target token; where the task asks for scores, those of the generated texts, and the mean
    number of tokens in one (``generated_tokens``).
    """

    def __init__(self, objective: Seq2SeqObjective, tokenizer: Any, scores: Scores):
        self.objective, self.tokenizer, self.scores = objective, tokenizer, scores
        self.losses: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        self.texts: list[str] = []
        self.references: list[str] = []

    def update(self, model: Callable, batch: Any) -> None:
        losses = self.objective.row_losses(model, batch)
        written = self._generated(model, batch) if self.scores.chosen else None
        if batch.samples == 0:
            return
        self.losses.append(losses.detach().double().cpu().numpy())
        self.targets.append((batch.labels != IGNORE).sum(1).cpu().numpy())
        if written is not None:
            ordinary = written[:, 1:].ne(self.tokenizer.pad_token_id)  # the first is what decoding starts with
            self.lengths.append(ordinary.sum(1).cpu().numpy())
            self.texts += decoded(self.tokenizer, written)
            self.references += batch.references

    @staticmethod
    def _generated(model: Any, batch: Any) -> Any:
        """(rows, width) tokens; None of a rank without rows."""
        forward = model if isinstance(model, Forward) else Forward(model, model)
        return forward.generate(batch.inputs, dummy=batch.samples == 0)

    def columns(self) -> dict[str, np.ndarray]:
        found = {"loss": self.losses, "targets": self.targets, "generated_tokens": self.lengths}
        columns = {name: np.concatenate(parts) for name, parts in found.items() if parts}
        return {**columns, **self.scores.columns(self.texts, self.references)} if self.texts else columns

    def numbers(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        tokens = int(columns["targets"].sum())
        loss = float(columns["loss"].sum()) / tokens
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
        if "generated_tokens" in columns:
            found |= {**self.scores.finish(columns), "generated_tokens": float(columns["generated_tokens"].mean())}
        return found

    def judged(self, learned: Learned) -> _judged.Judged:
        """``loss`` (the mean of the row's target tokens), and where it was generated ``gold``, ``generated`` and its
        scores."""
        columns = self.columns()
        means = columns["loss"] / columns["targets"]
        each = self.scores.each(columns) if self.texts else []
        found: list[dict[str, Any]] = [{"loss": float(loss)} for loss in means]
        for i, (text, reference) in enumerate(zip(self.texts, self.references, strict=True)):
            found[i] = {"gold": reference, "generated": text, **each[i], **found[i]}
        return list(enumerate(found))

    def error_of(self, judged: dict[str, Any]) -> float:
        return -self.scores.worth(judged) if "generated" in judged else judged["loss"]


def decoded(tokenizer: Any, tokens: Any) -> list[str]:
    """Generated tokens as text, without special tokens."""
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)
