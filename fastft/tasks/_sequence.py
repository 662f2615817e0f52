"""What tasks share that read one text, or a pair, and say something of it as a whole (classification, regression)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from fastft.data.encoder import Counts, Example
from fastft.data.formats import Record
from fastft.data.split import Split
from fastft.errors import UserError
from fastft.lazy import torch
from fastft.models import load
from fastft.tasks._text import TextEncoder, TextTask, padded, rows_of

# Name parts of the heads that transformers' families put on an encoder or a decoder for a whole sequence.
HEADS = (
    "classifier",
    "score",
    "pooler",
    "pre_classifier",
    "classification_head",
    "sequence_summary",
    "logits_proj",
)


class SequenceTask(TextTask):
    """Prepared columns: ``tokens``, and for pairs ``segments`` (token types)."""

    auto_class = "AutoModelForSequenceClassification"

    @cached_property
    def takes_segments(self) -> bool:
        """Whether the model's class has an input for token types (DistilBERT has none)."""
        return load.class_takes(self.model_config, self.auto_class, "token_type_ids")

    def inputs(self, split: Split, ids: np.ndarray) -> tuple[dict[str, Any], int, int]:
        """Padded inputs of some samples (a dummy row for none), their real tokens, and the tokens computed."""
        data, pad = split.data, self.tokenizer.pad_token_id
        rows = rows_of(data["tokens"], ids) or [np.full(1, pad, dtype=np.int32)]
        segments = rows_of(data["segments"], ids) or [np.zeros(1)] if "segments" in data.columns else None
        inputs = self.padded_inputs(rows, segments)
        computed = inputs["input_ids"].numel() if self.pads else len(inputs["rows_at"])
        return inputs, sum(map(len, rows)) if len(ids) else 0, computed

    def padded_inputs(self, rows: list[np.ndarray], segments: list[np.ndarray] | None) -> dict[str, Any]:
        """What the model is given of some rows, in training, evaluation and prediction alike: ``input_ids``,
        ``attention_mask`` and, where the model takes them, ``token_type_ids``; all (len(rows), width) int64. With
        ``places`` where it runs without padding.
        """
        width = self.width(rows)
        parts = {
            "input_ids": padded(rows, self.tokenizer.pad_token_id, width=width, side=self.padding_side),
            "attention_mask": padded([np.ones(len(row)) for row in rows], 0, width=width, side=self.padding_side),
        }
        if segments is not None and self.takes_segments:
            parts["token_type_ids"] = padded(segments, 0, width=width, side=self.padding_side)
        places = self.places(parts["attention_mask"] - 1)
        return {**{name: torch.from_numpy(values) for name, values in parts.items()}, **places}

    @cached_property
    def padding_side(self) -> str:
        """Left for models whose head reads the last position, padding or not (XLNet); right for all others, whatever
        the tokenizer says: positions are counted from the left.
        """
        return "left" if getattr(self.model_config, "summary_type", None) == "last" else "right"

    def check_model(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        """Refuse a tokenizer with more tokens than the model has; try the model on a short and a longer row, alone and
        together.
        """
        from fastft.models.trial import check_padding

        super().check_model(forward, model, device)
        self.unpad(forward, model, lambda rows: self.padded_inputs(rows, None), device)
        check_padding(forward, model, self, device)

    def encode_texts(self, texts: list[str], pairs: list[str | None], limit: int) -> tuple[dict[str, Any], list[int]]:
        """Padded inputs for predictions, cut to ``limit`` tokens, and the lengths before that."""
        if None in pairs and any(pairs):
            raise UserError("Some rows have a second text and others none.", "Give every row one, or none.")
        both: tuple = (texts,) if None in pairs else (texts, pairs)
        whole = self.tokenizer(*both, verbose=False, return_token_type_ids=True)
        cut = self.tokenizer(*both, truncation=True, max_length=limit, return_token_type_ids=True)
        rows, segments, full = [], [], []
        for i, ids in enumerate(whole["input_ids"]):
            begin = int(load.starts_twice(self.tokenizer, ids))
            full.append(len(ids) - begin)
            row = whole if full[-1] <= limit else cut
            rows.append(np.asarray(row["input_ids"][i][begin:] or [self.tokenizer.pad_token_id]))
            segments.append(np.asarray(row["token_type_ids"][i][begin:] or [0]))
        return self.padded_inputs(rows, segments if len(both) == 2 else None), full


class SequenceEncoder(TextEncoder):
    """Texts to tokens. ``extra`` is what the task reads of a row beside them."""

    def __init__(self, task: SequenceTask, text: str, pair: str | None, others: list[str]):
        super().__init__(task, [text, *([pair] if pair else [])], others)
        self.text, self.pair = text, pair
        self.columns = {"tokens": "ragged:<i4", **({"segments": "ragged:<i4"} if pair else {})}

    @abstractmethod
    def extra(self, where: str, record: Record) -> object:
        """Raises RowError, naming the row."""

    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        encoded = self._tokenize([record for _, record in rows])
        examples = []
        for i, (where, record) in enumerate(rows):
            row = self._fit(where, record, {name: values[i] for name, values in encoded.items()}, counts)
            if row is None:
                continue
            columns = {"tokens": row["input_ids"], **({"segments": row["token_type_ids"]} if self.pair else {})}
            examples.append(Example(where, columns, self.extra(where, record)))
        return examples

    def _tokenize(self, records: list[Record], **truncation: Any) -> dict[str, list[list[int]]]:
        texts = [str(r[self.text]) for r in records]
        if self.pair is None:
            return self.tokenizer(texts, verbose=False, **truncation) if truncation else {"input_ids": self.ids(texts)}
        pairs = [r[self.pair] for r in records]
        return self.tokenizer(texts, pairs, verbose=False, return_token_type_ids=True, **truncation)

    def _fit(self, where: str, record: Record, row: dict[str, list[int]], counts: Counts) -> dict | None:
        """The row, or what the truncation policy makes of it; None: not used."""
        if load.starts_twice(self.tokenizer, row["input_ids"]):
            row = {name: values[1:] for name, values in row.items()}
        length = len(row["input_ids"])
        if length == 0:  # nothing but what the tokenizer drops
            counts.empty += 1
            return None
        if length <= self.max_length:
            return row
        counts.too_long(where, length)
        if self.truncation == "truncate":  # the tokenizer knows which special tokens must stay
            counts.truncated += 1
            cut = self._tokenize([record], truncation=True, max_length=self.max_length)
            return {name: values[0] for name, values in cut.items()}
        counts.dropped += self.truncation == "drop"
        return None
