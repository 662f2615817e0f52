"""What tasks share that train a decoder on packed documents to predict each next token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fastft.config import Loss, Section
from fastft.data.encoder import Learned
from fastft.data.split import Split
from fastft.lazy import torch
from fastft.objectives.base import Objective
from fastft.tasks._documents import documents_of, pack
from fastft.tasks._language import (
    LanguageModelLoss,
    LanguageModelObjective,
    Perplexity,
    sample_inputs,
)
from fastft.tasks._text import TextTask
from fastft.tasks.base import IGNORE, Batch, Draw, Metric, ModelSpec

log = logging.getLogger(__name__)


class GenerationOptions(Section):
    """How text is generated."""

    max_new_tokens: int = Field(64, ge=1, description="Longest continuation in tokens.")
    temperature: float = Field(0.0, ge=0, description="0: the likeliest token; otherwise sampling, at least 0.01.")


class DecoderTask(TextTask):
    """Next-token prediction. Prepared columns: ``tokens`` and those of ``write_packs``; ``data.packing`` says whether
    sequences hold several documents.
    """

    Loss: ClassVar[type[Loss]] = LanguageModelLoss
    Predict: ClassVar[type[Section]] = GenerationOptions
    cuts_sequences = True
    bounds = False  # whether batches say where documents begin: settled by check_model

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
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(tokens)}
        if self._flash() or self.config.data.packing == "isolated":  # else those that the model counts by itself
            inputs["position_ids"] = torch.from_numpy(positions)
        if self.bounds:
            starts = np.flatnonzero(positions.ravel() == 0)
            ends = np.append(starts, positions.size)
            inputs |= {
                "cu_seq_lens_q": torch.from_numpy(ends.astype(np.int32)),
                "max_length_q": int(np.diff(ends).max()),
            }
        # use_cache: with a cache, transformers takes restarting positions for a continued sequence and masks nothing
        return Batch({**inputs, "use_cache": False}, torch.from_numpy(labels), samples, real, tokens.size)

    def documents(self, split: Split, sample: int) -> list[str]:
        return documents_of(split, sample)

    def _flash(self) -> bool:
        return self.config.model.attention == "flash_attention_2"

    def model(self, learned: Learned) -> ModelSpec:
        return ModelSpec("AutoModelForCausalLM")

    def check_model(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        from fastft.models.isolation import check_causality, check_isolation
        from fastft.models.trial import SHORT, check_runs

        super().check_model(forward, model, device)
        length = min(self.max_length, 16)
        if self.sequences is not None:
            self._attend_in_parts(forward, model, device)
        elif self.config.data.packing == "isolated":
            self._attend_by_document(forward, model, device)
        else:
            self.settled = {"layers": self._fuse(forward, model, None, device)}
        if self.config.data.packing == "isolated":
            check_isolation(forward, model, length, device, flat=self._flash())
        else:
            width = self.width([range(min(SHORT, self.max_length))])
            check_runs(forward, model, self._trial_inputs, width, self.max_length, device)
        check_causality(forward, model, self.width([range(length)]), device)

    def _attend_by_document(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        from fastft.models import documents

        found, why = documents.install(forward, model, self.config.model.attention, self.max_length, device)
        self.bounds = found is not None
        fused = self._fuse(forward, model, found, device)
        self.settled = {"attention": f"{'varlen' if found else 'by mask'}: {why}", "layers": fused}
        log.info("attention %s; layers %s", self.settled["attention"], fused)

    def _attend_in_parts(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        """Layers are not fused whole: those have attention of their own."""
        self.bounds = True
        fused = self._fuse(forward, model, None, device)
        self.settled = {"attention": self.sequences.sentence, "layers": fused}
        log.info("attention: %s; layers %s", self.settled["attention"], fused)

    def _fuse(self, forward: Callable, model: torch.nn.Module, found: Any, device: torch.device) -> str:
        """Fuse layers whole where attention is by document, or else their parts; one sentence for the record."""
        from fastft.models import layers, load, parts

        if self.config.model.layers == "plain":
            return "plain: asked for"
        why = "attention is by mask" if self.sequences is None else "sequences are cut over ranks"
        whole = f"plain: {why}" if found is None else layers.install(forward, model, found, self.max_length, device)
        if whole.startswith("fused") or device.type != "cuda":
            return whole
        return f"{whole}; by themselves: {parts.install(model, load.dtype_of(self.config.model.dtype), device)}"

    def _trial_inputs(self, width: int) -> dict[str, Any]:
        row = [np.arange(width) % 8]
        return dict(self._batch([row], width, 1, width).inputs)

    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        sample = {**sample_inputs(model, self.max_length, device), "use_cache": False}
        return LanguageModelObjective(self.config.loss, forward, model, sample, self.sequences)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Perplexity.names

    def new_metrics(self, objective: Objective, learned: Learned) -> Perplexity:
        return Perplexity(objective)
