"""Answers that evaluations have the model give, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastft.config import Config
from fastft.data.encoder import Learned
from fastft.inference.forward import Forward
from fastft.inference.generate import prompts_padded
from fastft.models import load
from fastft.tasks import _judged
from fastft.tasks._generated import Scores, generation_steps, names_of
from fastft.tasks._language import Perplexity

LONGEST = 256  # tokens of an answer, where nobody says how many


@dataclass(frozen=True)
class Asked:
    """The last answer of a conversation that is learned.

    Attributes
    ----------
    where : str
        File and line of the conversation.
    prompt, answer : (n,) int32
        Tokens before it, and its own.
    """

    where: str
    prompt: np.ndarray
    answer: np.ndarray


def asked(where: str, tokens: np.ndarray, weights: np.ndarray, ends_in: int | None) -> Asked | None:
    """Of a conversation's tokens and their weights; None: no answer is learned, or the last one is cut off.

    ``ends_in``: the token that ends an answer, where there is one.
    """
    learned = np.flatnonzero(weights > 0)
    if not len(learned):
        return None
    end = int(learned[-1]) + 1
    if end == len(tokens) and ends_in is not None and tokens[-1] != ends_in:
        return None
    before = np.flatnonzero(weights[:end] <= 0)
    return Asked(where, tokens[: int(before[-1]) + 1], tokens[int(before[-1]) + 1 : end]) if len(before) else None


class ChatMetrics(Perplexity):
    """Loss and perplexity per learned token, of packs; where scores are asked for, those of the last answers of all
    conversations, generated once all batches are seen: by length, however they were packed.
    """

    def __init__(self, objective: Any, tokenizer: Any, scores: Scores, config: Config):
        super().__init__(objective)
        self.tokenizer, self.scores, self.config = tokenizer, scores, config
        self.asked: list[tuple[int, Asked]] = []  # with the place of their sequence
        self.places = 0
        self.texts: list[str] = []
        self.lengths: list[int] = []

    def update(self, model: Callable, batch: Any) -> None:
        super().update(model, batch)
        self.asked += [(self.places + place, one) for place, one in batch.asked]
        self.places += batch.samples

    def complete(self, model: Any, most: Callable[[int], int]) -> Iterator[None]:
        if not self.scores.chosen:
            return
        forward = model if isinstance(model, Forward) else Forward(model, model)
        found: dict[int, np.ndarray] = {}
        settings = forward.model.generation_config
        for rows in generation_steps(self._sizes(settings), settings, self.config.batch.forward_tokens, most):
            for row, written in zip(rows, self._written(forward, rows), strict=True):
                found[int(row)] = written
            yield
        order = [found[i] for i in range(len(self.asked))]
        self.texts = [self._text(written) for written in order]
        self.lengths = [int((written != self.tokenizer.pad_token_id).sum()) for written in order]

    def _sizes(self, settings: Any) -> np.ndarray:
        longest = settings.max_new_tokens
        sizes = [(len(one.prompt), min(len(one.answer), longest)) for _, one in self.asked]
        return np.array(sizes, np.int64).reshape(-1, 2)

    def _written(self, forward: Forward, rows: np.ndarray) -> list[np.ndarray]:
        """The tokens that the model writes behind some prompts; a rank that has none left keeps step."""
        prompts = [self.asked[int(i)][1].prompt.tolist() for i in rows] or [[self.tokenizer.pad_token_id]]
        device = next(forward.model.parameters()).device
        inputs = prompts_padded(self.tokenizer, prompts, device)
        width, limit = inputs["input_ids"].shape[1], load.length_limit(forward.model.config)
        longest = forward.model.generation_config.max_new_tokens
        room = {} if limit is None else {"max_new_tokens": max(1, min(longest, limit - width))}
        out = forward.generate(inputs, dummy=not len(rows), **room)
        return [] if out is None else list(out[:, width:].cpu().numpy())

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def references(self) -> list[str]:
        return [self._text(one.answer) for _, one in self.asked]

    def columns(self) -> dict[str, np.ndarray]:
        return {**super().columns(), **(self._generated() if self.texts else {})}

    def _generated(self) -> dict[str, np.ndarray]:
        """A row for each conversation that was asked, not for each pack."""
        return {**self.scores.columns(self.texts, self.references()), "generated_tokens": np.array(self.lengths)}

    def numbers(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        found = super().numbers(columns)
        if "generated_tokens" in columns:
            found |= {**self.scores.finish(columns), "generated_tokens": float(columns["generated_tokens"].mean())}
        else:  # no conversation has an answer to ask for
            found |= {metric.name: math.nan for metric in names_of(self.scores.chosen)}
        return found

    def judged(self, learned: Learned) -> _judged.Judged | None:
        """``row``, ``gold``, ``generated`` and the scores of each; None where nothing is generated."""
        if not self.scores.chosen:
            return None
        each = self.scores.each(self._generated()) if self.texts else []
        return [
            (place, {"row": one.where, "gold": gold, "generated": text, **scores})
            for (place, one), gold, text, scores in zip(self.asked, self.references(), self.texts, each, strict=True)
        ]

    def error_of(self, judged: dict[str, Any]) -> float | None:
        return -self.scores.worth(judged)
