"""Masked language modeling: adapting encoders to a domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config import Config, Data, Section
from fastft.data.encoder import Counts, Example, Learned
from fastft.data.formats import Record
from fastft.data.split import Split
from fastft.data.store import Store
from fastft.errors import UserError
from fastft.inference.base import Predictor, Row
from fastft.lazy import torch
from fastft.models import load
from fastft.objectives.base import Objective
from fastft.tasks._corpus import Words, open_corpora
from fastft.tasks._documents import count_long, documents_of, pack, pieces, write_packs
from fastft.tasks._language import (
    LanguageModelLoss,
    LanguageModelObjective,
    Perplexity,
    sample_inputs,
)
from fastft.tasks._text import TextEncoder, TextTask, padded
from fastft.tasks._words import HAN, segmenter, spans
from fastft.tasks.base import IGNORE, Batch, Draw, Metric, ModelSpec

# Name parts of the language modeling heads of encoders, which a checkpoint without one does not have.
HEADS = (
    "cls",
    "lm_head",
    "predictions",
    "vocab_transform",
    "vocab_layer_norm",
    "vocab_projector",
    "generator_predictions",
    "generator_lm_head",
    "decoder",
    "head",
)
PACKING_HINT = "Set data.packing: none (one document per row) for this model."


class MaskedLMData(Data):
    """Documents, and which of their tokens are masked."""

    text: str = Field("text", description="Column of the text.")
    packing: Literal["isolated", "none"] = Field(
        "isolated", description="Fill sequences with whole documents that cannot see each other."
    )
    mask_share: float = Field(0.15, gt=0, lt=1, description="Share of a document's tokens that are predicted.")
    whole_words: bool = Field(True, description="Predict all pieces of a word, or none.")
    chinese_words: Literal["auto", "jieba", "none"] = Field(
        "auto",
        description="whole_words: what a word is in Chinese text. jieba: as it segments (pip install jieba); none: a "
        "character; auto: jieba where it is installed.",
    )
    replace_mask: float = Field(0.8, ge=0, le=1, description="Share of predicted tokens that become the mask token.")
    replace_random: float = Field(0.1, ge=0, le=1, description="Share that becomes a random token; the rest stays.")

    def check(self, config: Config) -> None:
        if self.replace_mask + self.replace_random > 1:
            raise ValueError("data.replace_mask and data.replace_random are more than 1 together")


class FillOptions(Section):
    """How masks are filled."""

    top_k: int = Field(5, ge=1, description="Candidates for each mask.")


@dataclass
class MaskedBatch(Batch):
    """Attributes
    ----------
    weights : (B, T) float32
        Factor of each target's loss: a document weighs as ``mask_share`` of its tokens, however many were drawn.
    rows : (n,) int64
        Positions, in the flattened batch, that have a target.
    """

    weights: Any = None
    rows: Any = None


@rooms.TASKS.register("masked_lm")
class MaskedLM(TextTask):
    """Devlin et al. 2019, arXiv 1810.04805; whole words: Cui et al. 2019, arXiv 1906.08101.

    Which tokens are masked is a function of the run's seed, the epoch and the sample; in evaluations of the seed and
    the sample. Prepared columns: those of ``MaskedEncoder``.
    """

    Data = MaskedLMData
    Loss = LanguageModelLoss
    Predict = FillOptions

    def encoder(self, learned: Learned | None) -> MaskedEncoder:
        if self.tokenizer.mask_token_id is None:
            raise UserError(
                f"model path {self.config.model.path}: its tokenizer has no mask token.",
                "masked_lm is for encoders; for decoders there is causal_lm.",
            )
        return MaskedEncoder(self)

    @property
    def room(self) -> int:
        return self.max_length - sum(map(len, self.special))

    def corpus_split(
        self, name: str, folders: list[Path], learned: Learned | None, only: Sequence[str | None]
    ) -> Split:
        split = open_corpora(self, name, folders, self.encoder(learned), learned, only, bare=True)
        split.data.columns["words"] = Words(self, split.data["tokens"])  # type: ignore[assignment]
        return split

    @cached_property
    def special(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a document."""
        whole, bare = (self.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :]

    # -- batches -------------------------------------------------------------------------------------------------------

    def collate(self, split: Split, ids: np.ndarray, draw: Draw) -> MaskedBatch:
        rows = [list(zip(pack(split.data, int(i)), pack(split.data, int(i), "words"), strict=True)) for i in ids]
        packed = self.config.data.packing == "isolated"
        real = int(split.lengths[ids].sum()) if len(ids) else 0
        longest = int(split.lengths[ids].max()) if len(ids) else 2
        width = self.max_length if packed else self.width([range(longest)])
        before, after = self.special
        tokens = np.full((max(len(rows), 1), width), self.tokenizer.pad_token_id, dtype=np.int64)
        labels, weights = np.full(tokens.shape, IGNORE), np.zeros(tokens.shape, dtype=np.float32)
        documents = np.full(tokens.shape, -1)  # -1: padding
        positions = np.zeros(tokens.shape, dtype=np.int64)
        for r, row in enumerate(rows):
            at, generator = 0, draw.generator(r, int(ids[r]))
            for d, (piece, words) in enumerate(row):
                shown, chosen, quota = self._masked(piece.astype(np.int64), words, generator)
                n, start = len(before) + len(piece) + len(after), at + len(before)
                tokens[r, at : at + n] = [*before, *shown, *after]
                labels[r, start : start + len(piece)][chosen] = piece[chosen]
                weights[r, start : start + len(piece)][chosen] = quota / max(1, int(chosen.sum()))
                documents[r, at : at + n], positions[r, at : at + n] = d, np.arange(n)
                at += n
        inputs = self._inputs(tokens, documents, positions) if packed else self._unpacked(tokens, documents)
        where = torch.from_numpy(np.flatnonzero(labels.ravel() != IGNORE))
        factors = torch.from_numpy(weights)
        computed = tokens.size if self.pads else len(inputs["rows_at"])
        return MaskedBatch(inputs, torch.from_numpy(labels), len(ids), real, computed, factors, where)

    def _masked(
        self, piece: np.ndarray, words: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """What is shown of a document, which of its tokens are predicted (bool), and how many were to be."""
        data, quota = self.config.data, _quota(len(piece), self.config.data.mask_share)
        units = words if data.whole_words else np.arange(len(piece))
        _, unit, sizes = np.unique(units, return_inverse=True, return_counts=True)
        order = generator.permutation(len(sizes))
        taken, left = np.zeros(len(sizes), dtype=bool), quota
        for u in order:
            if sizes[u] <= left:
                taken[u] = True
                left -= sizes[u]
            if left == 0:
                break
        if not taken.any():  # every word is longer than the quota
            taken[order[0]] = True
        chosen = taken[unit]
        fate, shown = generator.random(len(piece)), piece.copy()
        shown[chosen & (fate < data.replace_mask)] = self.tokenizer.mask_token_id
        random = chosen & (fate >= data.replace_mask) & (fate < data.replace_mask + data.replace_random)
        shown[random] = generator.integers(len(self.tokenizer), size=int(random.sum()))
        return shown, chosen, quota

    def _unpacked(self, tokens: np.ndarray, documents: np.ndarray) -> dict[str, Any]:
        mask = (documents >= 0).astype(np.int64)
        mask[:, 0] = 1  # also of a dummy row
        shown = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
        return {**shown, **self.places(mask - 1)}

    def _inputs(self, tokens: np.ndarray, documents: np.ndarray, positions: np.ndarray) -> dict[str, Any]:
        """Documents of a row see themselves alone; what is left of it is one more document."""
        offset = load.position_offset(self.model_config)
        inputs = {"input_ids": torch.from_numpy(tokens), "position_ids": torch.from_numpy(positions + offset)}
        if not self.pads:
            return {**inputs, **self.places(documents)}
        same = torch.from_numpy(documents[:, None, :, None] == documents[:, None, None, :])  # (B, 1, T, T)
        return {**inputs, "attention_mask": same}

    def documents(self, split: Split, sample: int) -> list[str]:
        return documents_of(split, sample)

    # -- model ---------------------------------------------------------------------------------------------------------

    def model(self, learned: Learned) -> ModelSpec:
        return ModelSpec("AutoModelForMaskedLM", HEADS)

    @classmethod
    def fits(cls, model_config: Any) -> bool:
        return "MaskedLM" in (model_config.architectures or [""])[0]

    def check_model(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        super().check_model(forward, model, device)
        self.unpad(forward, model, self._rows, device)
        if self.config.data.packing == "isolated":
            self._check_packing(forward, model, device)

    def _rows(self, rows: list[np.ndarray]) -> dict[str, Any]:
        tokens = padded(rows, self.tokenizer.pad_token_id, width=self.width(rows))
        return self._unpacked(tokens, padded([np.zeros(len(row)) for row in rows], -1, width=tokens.shape[1]))

    def _check_packing(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        """Two documents in one row must give the logits of each alone, as the model takes it by itself."""
        from fastft.models.isolation import refuse_leak
        from fastft.models.trial import on_device

        length = min(self.max_length, 16)
        tokens = sample_inputs(model, length, device)["input_ids"].cpu().numpy()[:1]
        cut = tokens.shape[1] // 2 - 1
        documents = (np.arange(tokens.shape[1]) >= cut).astype(np.int64)[None]
        positions = np.concatenate([np.arange(cut), np.arange(tokens.shape[1] - cut)])[None]
        pad = self.model_config.pad_token_id or 0
        tokens[tokens == pad] = pad + 1  # some count positions by it

        def logits(inputs: dict[str, Any]) -> torch.Tensor:
            return forward(**{name: on_device(value, device) for name, value in inputs.items()}).logits.float()

        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                packed = logits(self._inputs(tokens, documents, positions))
                parts = (tokens[:, :cut], tokens[:, cut:])
                alone = [logits(self._unpacked(part, np.zeros(part.shape, np.int64))) for part in parts]
        except (TypeError, ValueError, RuntimeError) as e:
            reason = str(e).strip().splitlines()[0][:200]
            raise UserError(
                f"{type(model).__name__} cannot take several documents in a row: {reason}", PACKING_HINT
            ) from None
        finally:
            model.train(was_training)
        refuse_leak(model, packed, torch.cat(alone, dim=1), PACKING_HINT)

    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        return MaskedObjective(self.config.loss, forward, model, sample_inputs(model, self.max_length, device))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Perplexity.names

    def new_metrics(self, objective: Objective, learned: Learned) -> Perplexity:
        return Perplexity(objective)

    def predictor(self, model: torch.nn.Module, learned: Learned, options: FillOptions) -> Predictor:
        return MaskFiller(self, model, options.top_k)


class MaskedObjective(LanguageModelObjective):
    """Cross-entropy at the masked positions, which alone go through the head."""

    def compute_loss(self, model: Callable, batch: Any, scale: torch.Tensor) -> torch.Tensor:
        smoothing = {"label_smoothing": self.settings.label_smoothing, "z_loss": self.settings.z_loss}
        return self._masked(model, batch, batch.weights * scale, **smoothing)

    def token_losses(self, model: Callable, batch: Any) -> torch.Tensor:
        return self._masked(model, batch, torch.ones_like(batch.weights), reduction="none").reshape(batch.labels.shape)

    def _masked(self, model: Callable, batch: Any, weights: torch.Tensor, **options: Any) -> torch.Tensor:
        if self.head is None or not len(batch.rows):
            return self._sum(model, batch, token_weight=weights, **options)
        rows = batch.rows
        return self._sum(model, batch, rows=rows, token_weight=weights.flatten().index_select(0, rows), **options)


class MaskedEncoder(TextEncoder):
    """Documents to tokens and words, then to packs.

    Columns: ``tokens`` and ``words`` (the word that a token belongs to, counted in its document), without special
    tokens, and those of ``write_packs``.
    """

    columns = {"tokens": "ragged:<i4", "words": "ragged:<i4"}
    choices = ("split", "truncate", "drop")

    def __init__(self, task: MaskedLM):
        data = task.config.data
        super().__init__(task, [data.text])
        self.data, self.room = data, task.room
        self.segment = segmenter(data.chinese_words) if data.whole_words else None
        if not self.tokenizer.is_fast and data.whole_words:
            raise UserError(
                f"tokenizer {task.config.model.tokenizer or task.config.model.path}: cannot tell words apart, for "
                "it is no fast tokenizer.",
                "Set data.whole_words: false.",
            )

    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        texts = [str(record[self.data.text]) for _, record in rows]
        how = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(texts, return_offsets_mapping=self.tokenizer.is_fast, **how)
        examples = []
        for i, (where, _) in enumerate(rows):
            ids = encoded["input_ids"][i]
            if not ids:  # nothing but what the tokenizer drops
                counts.empty += 1
                continue
            count_long(where, len(ids), self.room, self.truncation, counts)
            words = self._words(texts[i], encoded, i) if self.tokenizer.is_fast else list(range(len(ids)))
            examples.append(Example(where, {"tokens": ids, "words": words}))
        return examples

    def _words(self, text: str, encoded: Any, i: int) -> list[int]:
        """By the tokenizer's own words; in Chinese text by the segmenter's."""
        words = [-1 if w is None else w for w in encoded.word_ids(i)]
        if self.segment is None or not HAN.search(text):
            return words
        word_at = np.full(len(text) + 1, -1)
        for number, (start, stop) in enumerate(spans(text, self.segment)):
            word_at[start:stop] = len(words) + number  # numbers that the tokenizer's own words do not have
        found = [int(word_at[start]) for start, _ in encoded["offset_mapping"][i]]
        return [word if own < 0 else own for word, own in zip(words, found, strict=True)]

    def finish(self, store: Store, learned: Learned | None) -> dict:
        tokens = store.ragged("tokens")
        sums = {"documents": len(tokens), "tokens": len(tokens.values)}
        return {**self.plan(store, tokens.lengths(), np.asarray(store.starts)), **sums}

    def plan(self, store: Store, lengths: np.ndarray, starts: np.ndarray) -> dict:
        """Pack documents by their lengths; no sequence crosses ``starts``: where shards, or sources, begin."""
        parts = pieces(lengths, self.room, self.truncation, overlap=0)
        targets = np.maximum(1, np.rint(parts[2] * self.data.mask_share)).astype(np.int64)  # _quota of each
        packed, groups = self.data.packing == "isolated", np.searchsorted(parts[0], starts)
        return {
            "totals": write_packs(store, parts, self.max_length, packed, self.max_length - self.room, targets, groups)
        }


class MaskFiller(Predictor):
    """``text`` and ``masks``: for each mask token of the text its likeliest fillings, ``token`` and ``score``;
    ``truncated`` when the text was cut, perhaps with some of them.
    """

    def __init__(self, task: MaskedLM, model: torch.nn.Module, top_k: int):
        self.task, self.top_k = task, top_k
        self.model: Any = model
        self.fields = {"text": task.config.data.text}

    def prepare(self, where: str, row: Row) -> Row:
        mask = self.task.tokenizer.mask_token
        if mask not in row["text"]:
            raise UserError(f"{where}: the text has no {mask}.", f"Put {mask} where a token is to be filled in.")
        return super().prepare(where, row)

    def run(self, rows: list[Row]) -> list[dict]:
        tokenizer = self.task.tokenizer
        texts = [row["text"] for row in rows]
        how = {"padding": True, "truncation": True, "max_length": self.task.max_length, "return_tensors": "pt"}
        encoded = tokenizer(texts, return_token_type_ids=False, **how).to(self.model.device)
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        scores = self.model(**encoded).logits.float().softmax(-1)
        records = []
        for text, ids, row, length in zip(texts, encoded["input_ids"], scores, lengths, strict=True):
            best = row[ids == tokenizer.mask_token_id].topk(min(self.top_k, row.shape[-1]))
            masks = [
                [{"token": tokenizer.decode([int(t)]).strip(), "score": float(p)} for t, p in zip(*pair, strict=True)]
                for pair in zip(best.indices, best.values, strict=True)
            ]
            cut = {"truncated": True} if length > self.task.max_length else {}
            records.append({"text": text, "masks": masks, **cut})
        return records


def _quota(tokens: int, share: float) -> int:
    """How many tokens of a document are predicted."""
    return max(1, round(tokens * share))
