"""Rows of source and target to tokens."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.data.encoder import Counts, Example, Learned, RowError, check_text, write_sizes
from fastft.data.formats.base import MISSING, Record, value_of
from fastft.data.store import Store
from fastft.errors import UserError, did_you_mean
from fastft.models import load
from fastft.tasks._text import TextEncoder

if TYPE_CHECKING:
    from fastft.tasks.seq2seq import Seq2Seq

log = logging.getLogger(__name__)

# Scripts that BLEU's usual rules do not cut into words.
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
UNSPACED = re.compile(r"[\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # kana, Thai, Lao, Burmese, Khmer


class PairEncoder(TextEncoder):
    """Columns: ``source`` and ``target`` (tokens, with what the tokenizer puts around them), in evaluation sets
    ``reference`` (the target's UTF-8), and those of ``write_sizes``.

    Parameters
    ----------
    references : bool
        Whether to keep the targets' texts.
    """

    def __init__(self, task: Seq2Seq, references: bool):
        self.data = task.config.data
        super().__init__(task, [self.data.source, self.data.target])
        self.prefix, self.target_length = task.prefix, task.target_length
        self.limits = {"source": task.limit("encoder"), "target": task.limit("decoder")}
        self.start = load.start_of_decoder(task.model_config)
        self.references = references
        self.columns = {"source": "ragged:<i4", "target": "ragged:<i4"}
        if references:
            self.columns["reference"] = "ragged:|u1"

    def accepts(self, where: str, record: Record) -> bool:
        for key, column in (("source", self.data.source), ("target", self.data.target)):
            if (value := value_of(record, column)) is MISSING:
                hint = f"{did_you_mean(column, record)} Set data.source / data.target to the columns of your data."
                raise RowError(f"{where}: no column {column!r}.", hint)
            check_text(where, column, value)
            if not value.strip() and key == "target":
                raise RowError(f"{where}: the target (column {column!r}) is empty.", "Fix or remove the row.")
        return bool(str(value_of(record, self.data.source)).strip())

    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        sources = [self.prefix + str(value_of(record, self.data.source)) for _, record in rows]
        targets = [str(value_of(record, self.data.target)) for _, record in rows]
        examples = []
        both = zip(rows, sources, targets, self.source_ids(sources), self.target_ids(targets), strict=True)
        for (where, _), source, target, source_ids, target_ids in both:
            if not source_ids:  # nothing but what the tokenizer drops
                counts.empty += 1
                continue
            if not set(target_ids) - self._special:
                raise RowError(
                    f"{where}: the target (column {self.data.target!r}) has no token: {target!r}.",
                    "The tokenizer drops all of it. Fix or remove the row.",
                )
            fitted = self._fit(where, source, target, source_ids, target_ids, counts)
            if fitted is None:
                continue
            counts.add("unknown_target_tokens", fitted[1].count(self.tokenizer.unk_token_id))
            # Characters of the targets, by how BLEU has to cut them.
            for kind, pattern in (("zh", HAN), ("char", UNSPACED)):
                self.sums[kind] += len(pattern.findall(target))
            self.sums["13a"] += len(target)
            columns: dict[str, Any] = {"source": fitted[0], "target": fitted[1]}
            if self.references:
                columns["reference"] = np.frombuffer(target.encode(), np.uint8)
            examples.append(Example(where, columns))
        return examples

    def source_ids(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """Tokens of sources, prefix included; cut to ``limit``."""
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        whole = {"return_attention_mask": False, "verbose": False}
        found = self.tokenizer(texts, **whole, **cut)["input_ids"] if cut else self.ids(texts)
        return [ids[1:] if load.starts_twice(self.tokenizer, ids) else ids for ids in found]

    def target_ids(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """Tokens of targets, which end with the end token, perhaps behind it with a language's code."""
        end, found = self.tokenizer.eos_token_id, []
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        for ids in self.tokenizer(text_target=texts, return_attention_mask=False, verbose=False, **cut)["input_ids"]:
            ids = ids[1:] if load.starts_twice(self.tokenizer, ids) else ids
            # The decoder's start token comes with the shift: a second one would be learned as a target.
            ids = ids[1:] if ids[:1] == [self.start] and len(ids) > 1 else ids
            if end is not None and not set(ids[-2:]) & {end, self.tokenizer.sep_token_id}:
                ids = [*(ids if limit is None else ids[: limit - 1]), end]
            found.append(ids)
        return found

    @property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}

    def _fit(
        self, where: str, source: str, target: str, source_ids: list[int], target_ids: list[int], counts: Counts
    ) -> tuple[list[int], list[int]] | None:
        """Both, or what the truncation policy makes of them; None: not used."""
        long = {"source": len(source_ids) > self.max_length, "target": len(target_ids) > self.target_length}
        if not any(long.values()):
            return source_ids, target_ids
        for part, ids in (("source", source_ids), ("target", target_ids)):
            if long[part]:
                counts.too_long(f"{where} ({part})", len(ids))
                counts.add(f"long_{part}s")
        if self.truncation == "drop":
            counts.dropped += 1
            return None
        counts.truncated += 1
        if long["source"]:
            source_ids = self.source_ids([source], self.max_length)[0]
        if long["target"]:
            target_ids = self.target_ids([target], self.target_length)[0]
        return source_ids, target_ids

    def settle(self, counts: Counts) -> None:
        if self.truncation == "error" and counts.overlong_total:
            parts = (("source", "max_length", self.max_length), ("target", "max_target_length", self.target_length))
            said = [
                f"{more} {part}s than data.{key} = {limit} tokens (the model's limit: {self.limits[part] or 'none'})"
                for part, key, limit in parts
                if (more := counts.more.get(f"long_{part}s"))
            ]
            raise UserError(
                f"Longer are {' and '.join(said)}, of {counts.rows} rows (longest: {counts.longest}), first: "
                f"{'; '.join(counts.overlong)}.",
                f"Choose data.truncation: {', '.join(self.choices)}, or raise the limit.",
            )

    def finish(self, store: Store, learned: Learned | None) -> dict:
        sizes = np.stack([store.ragged(name).lengths() for name in ("source", "target")], axis=1)
        totals = write_sizes(store, sizes, sizes[:, 1])
        whole = max(self.sums["13a"], 1)
        # kana are what tells Japanese, of which a third to a half are, from Chinese
        kind = "char" if self.sums["char"] > 0.1 * whole else "zh" if self.sums["zh"] > 0.3 * whole else "13a"
        return {"totals": totals, "learned": {"bleu_tokenize": kind}}
