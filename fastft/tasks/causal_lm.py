"""Causal language modeling: whole documents packed into sequences in which they cannot see each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config import Data
from fastft.data.encoder import Counts, Example, Learned
from fastft.data.formats import Record
from fastft.data.split import Split
from fastft.data.store import Store
from fastft.inference.base import Predictor
from fastft.lazy import torch
from fastft.models import load
from fastft.tasks._corpus import open_corpora
from fastft.tasks._decoder import DecoderTask, GenerationOptions
from fastft.tasks._documents import count_long, pieces, write_packs
from fastft.tasks._text import TextEncoder


class CausalLMData(Data):
    """Documents."""

    text: str = Field("text", description="Column of the text.")
    packing: Literal["isolated", "none"] = Field(
        "isolated", description="Fill sequences with whole documents that cannot see each other."
    )


@rooms.TASKS.register("causal_lm")
class CausalLM(DecoderTask):
    """Next-token prediction of documents. Prepared columns: those of ``DocumentEncoder``."""

    Data = CausalLMData

    def encoder(self, learned: Learned | None) -> DocumentEncoder:
        return DocumentEncoder(self)

    def corpus_split(
        self, name: str, folders: list[Path], learned: Learned | None, only: Sequence[str | None]
    ) -> Split:
        return open_corpora(self, name, folders, self.encoder(learned), learned, only, bare=False)

    @classmethod
    def fits(cls, model_config: Any) -> bool:
        kind = (model_config.architectures or [""])[0]
        return "CausalLM" in kind or "LMHead" in kind or load.is_of(model_config, "AutoModelForCausalLM")

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

    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        texts = [str(record[self.text]) for _, record in rows]
        examples = []
        for (where, _), ids in zip(rows, self.ids(texts), strict=True):
            if not ids:  # nothing but what the tokenizer drops
                counts.empty += 1
                continue
            ids = ids[1:] if load.starts_twice(self.tokenizer, ids) else ids
            ids = ids if self.end and ids and ids[-1] == self.end[0] else ids + self.end
            count_long(where, len(ids), self.max_length, self.truncation, counts)
            examples.append(Example(where, {"tokens": ids}))
        self.sums["characters"] += sum(map(len, texts))
        return examples

    def finish(self, store: Store, learned: Learned | None) -> dict:
        tokens = store.ragged("tokens")
        sums = {"documents": len(tokens), "tokens": len(tokens.values), "characters": self.sums["characters"]}
        return {**self.plan(store, tokens.lengths(), np.asarray(store.starts)), **sums}

    def plan(self, store: Store, lengths: np.ndarray, starts: np.ndarray) -> dict:
        """Pack documents by their lengths; no sequence crosses ``starts``: where shards, or sources, begin."""
        # Neighbors share one token, so that every token but the document's first is predicted once.
        parts = pieces(lengths, self.max_length, self.truncation, overlap=1)
        targets = parts[2] - 1  # a piece's first token is no target
        groups = np.searchsorted(parts[0], starts)
        return {"totals": write_packs(store, parts, self.max_length, self.packing == "isolated", 0, targets, groups)}
