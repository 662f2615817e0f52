"""Causal language modeling: whole documents packed into sequences in which they cannot see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config import Data, Section
from fastft.data.encoder import Counts, Example, Learned
from fastft.data.formats import Record
from fastft.data.split import Split
from fastft.data.store import Store
from fastft.inference.base import Predictor
from fastft.lazy import torch
from fastft.models import load
from fastft.objectives.base import Objective
from fastft.tasks._documents import count_long, documents_of, pack, pieces, write_packs
from fastft.tasks._language import (
    LanguageModelLoss,
    LanguageModelObjective,
    Perplexity,
    sample_inputs,
)
from fastft.tasks._text import TextEncoder, TextTask
from fastft.tasks.base import IGNORE, Batch, Draw, Metric, ModelSpec


class CausalLMData(Data):
    """Documents."""

    text: str = Field("text", description="Column of the text.")
    packing: Literal["isolated", "none"] = Field(
        "isolated", description="Fill sequences with whole documents that cannot see each other."
    )


class GenerationOptions(Section):
    """How text is generated."""

    max_new_tokens: int = Field(64, ge=1, description="Longest continuation in tokens.")
    temperature: float = Field(0.0, ge=0, description="0: the likeliest token; otherwise sampling, at least 0.01.")


@rooms.TASKS.register("causal_lm")
class CausalLM(TextTask):
    """Next-token prediction. Prepared columns: those of ``DocumentEncoder``."""

    Data = CausalLMData
    Loss = LanguageModelLoss
    Predict = GenerationOptions

    def encoder(self, learned: Learned | None) -> DocumentEncoder:
        return DocumentEncoder(self)

    def collate(self, split: Split, ids: np.ndarray, draw: Draw) -> Batch:
        rows = [pack(split.data, int(i)) for i in ids] or [[np.zeros(1, dtype=np.int32)]]
        packed = self.config.data.packing == "isolated"
        real = 0 if len(ids) == 0 else int(split.lengths[ids].sum())
        width = self.max_length if packed else self.width([np.concatenate(row) for row in rows])
        return self._batch(rows, width, len(ids), real)

    def _batch(self, rows: list[list[np.ndarray]], width: int, samples: int, real: int) -> Batch:
        """Rows of pieces, each piece a document or a part of one."""
        tokens = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64)
        labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
        positions = np.zeros((len(rows), width), dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for piece in row:
                n = len(piece)
                tokens[r, at : at + n] = piece
                labels[r, at : at + n - 1] = piece[1:]  # labels are already shifted: position t predicts token t + 1
                positions[r, at : at + n] = np.arange(n)
                at += n
            positions[r, at:] = np.arange(width - at)  # padding is one more document, which nothing is learned from
        if self._flash():  # its variable-length kernels want one row
            tokens, labels, positions = (a.reshape(1, -1) for a in (tokens, labels, positions))
        inputs = {"input_ids": torch.from_numpy(tokens)}
        if self._flash() or self.config.data.packing == "isolated":  # else those that the model counts by itself
            inputs["position_ids"] = torch.from_numpy(positions)
        # use_cache: with a cache, transformers takes restarting positions for a continued sequence and masks nothing
        return Batch({**inputs, "use_cache": False}, torch.from_numpy(labels), samples, real, tokens.size)

    def documents(self, split: Split, sample: int) -> list[str]:
        return documents_of(split, sample)

    def _flash(self) -> bool:
        return self.config.model.attention == "flash_attention_2"

    def model(self, learned: Learned) -> ModelSpec:
        return ModelSpec("AutoModelForCausalLM")

    @classmethod
    def fits(cls, model_config: Any) -> bool:
        kind = (model_config.architectures or [""])[0]
        return "CausalLM" in kind or "LMHead" in kind or load.is_of(model_config, "AutoModelForCausalLM")

    def check_model(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        from fastft.models.isolation import check_causality, check_isolation
        from fastft.models.trial import SHORT, check_runs

        super().check_model(forward, model, device)
        length = min(self.max_length, 16)
        if self.config.data.packing == "isolated":
            check_isolation(forward, model, length, device, flat=self._flash())
        else:
            width = self.width([range(min(SHORT, self.max_length))])
            check_runs(forward, model, self._trial_inputs, width, self.max_length, device)
        check_causality(forward, model, self.width([range(length)]), device)

    def _trial_inputs(self, width: int) -> dict[str, Any]:
        row = [np.arange(width) % 8]
        return dict(self._batch([row], width, 1, width).inputs)

    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        sample = {**sample_inputs(model, self.max_length, device), "use_cache": False}
        return LanguageModelObjective(self.config.loss, forward, model, sample)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Perplexity.names

    def new_metrics(self, objective: Objective, learned: Learned) -> Perplexity:
        return Perplexity(objective)

    def predictor(self, model: torch.nn.Module, learned: Learned, options: GenerationOptions) -> Predictor:
        from fastft.inference.generate import Generator

        return Generator(model, self.tokenizer, self.config.data.text, options.max_new_tokens, options.temperature)


class DocumentEncoder(TextEncoder):
    """Documents to tokens, then to packs.

    Columns: ``tokens`` (a document per row, ending in EOS), ``piece_doc``, ``piece_start``, ``piece_length`` (parts of
    documents no longer than max_length) and ``packs`` (pieces per training sequence).
    """

    columns = {"tokens": "ragged:<i4"}
    choices = ("split", "truncate", "drop")

    def __init__(self, task: CausalLM):
        self.text, self.packing = task.config.data.text, task.config.data.packing
        super().__init__(task, [self.text])
        eos = self.tokenizer.eos_token_id
        self.end = [eos] if eos is not None else []
        self.characters = 0

    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        texts = [str(record[self.text]) for _, record in rows]
        encoded = self.tokenizer(texts, add_special_tokens=True, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        examples = []
        for (where, _), ids in zip(rows, encoded, strict=True):
            if not ids:  # nothing but what the tokenizer drops
                counts.empty += 1
                continue
            ids = ids[1:] if load.starts_twice(self.tokenizer, ids) else ids
            ids = ids if self.end and ids and ids[-1] == self.end[0] else ids + self.end
            count_long(where, len(ids), self.max_length, self.truncation, counts)
            examples.append(Example(where, {"tokens": ids}))
        self.characters += sum(map(len, texts))
        return examples

    def finish(self, store: Store, learned: Learned | None) -> dict:
        tokens = store.ragged("tokens")
        # Neighbors share one token, so that every token but the document's first is predicted once.
        parts = pieces(tokens.lengths(), self.max_length, self.truncation, overlap=1)
        targets = parts[2] - 1  # a piece's first token is no target
        totals = write_packs(store, parts, self.max_length, self.packing == "isolated", 0, targets)
        sums = {"documents": len(tokens), "tokens": len(tokens.values), "characters": self.characters}
        return {"totals": totals, **sums}
