"""What is measured of an encoder-decoder model: the loss of its targets, and scores of what it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.data.encoder import Learned
from fastft.inference.forward import Forward
from fastft.tasks import _judged
from fastft.tasks._generated import Scores, generation_steps
from fastft.tasks._language import Perplexity
from fastft.tasks.seq2seq.objective import Seq2SeqObjective

if TYPE_CHECKING:
    from fastft.tasks.seq2seq import Seq2Seq


class PairMetrics(Perplexity):
    """Loss and perplexity per target token; where the task asks for scores, those of the generated texts, and the mean
    number of tokens in one (``generated_tokens``).
    """

    def __init__(self, objective: Seq2SeqObjective, task: Seq2Seq, scores: Scores):
        super().__init__(objective)
        self.task, self.scores = task, scores
        self.sources: list[np.ndarray] = []
        self.references: list[str] = []
        self.written: list[np.ndarray] = []  # tokens of each row, with the one that decoding starts with
        self.texts: list[str] = []

    def update(self, model: Callable, batch: Any) -> None:
        super().update(model, batch)
        if self.scores.chosen and batch.samples:
            tokens, lengths = batch.inputs["input_ids"].cpu().numpy(), batch.inputs["attention_mask"].sum(1).tolist()
            self.sources += [row[:length] for row, length in zip(tokens, lengths, strict=True)]
            self.references += batch.references

    def complete(self, model: Any, most: Callable[[int], int]) -> Iterator[None]:
        """Generate: rows of all batches, by the lengths of their sources and references."""
        if not self.scores.chosen:
            return
        forward = model if isinstance(model, Forward) else Forward(model, model)
        targets = np.concatenate([np.zeros(0, np.int64), *self.targets])
        sizes = np.stack([np.array([len(row) for row in self.sources], np.int64), targets], axis=1)
        found: dict[int, np.ndarray] = {}
        device = next(forward.model.parameters()).device
        for rows in generation_steps(sizes, forward.model.generation_config, self._micro_tokens, most):
            sources = [self.sources[int(i)] for i in rows] or [np.zeros(1, np.int64)]
            inputs = {name: value.to(device) for name, value in self.task.padded_inputs(sources).items()}
            written = forward.generate(inputs, dummy=not len(rows))
            if written is not None:
                found |= dict(zip(rows.tolist(), written.cpu().numpy(), strict=True))
            yield
        self.written = [found[i] for i in range(len(self.sources))]
        self.texts = decoded(self.task.tokenizer, self.written)

    @property
    def _micro_tokens(self) -> int:
        return self.task.config.batch.forward_tokens

    def columns(self) -> dict[str, np.ndarray]:
        columns = super().columns()
        if not self.texts:
            return columns
        pad = self.task.tokenizer.pad_token_id
        lengths = np.array([int((row[1:] != pad).sum()) for row in self.written])
        return {**columns, "generated_tokens": lengths, **self.scores.columns(self.texts, self.references)}

    def numbers(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        found = super().numbers(columns)
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
