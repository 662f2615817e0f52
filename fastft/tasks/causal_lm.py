"""Causal language modelling: whole documents packed into sequences in which they cannot see each other."""

import logging
import math
from array import array
from pathlib import Path

import numpy as np
import torch

from fastft.config import Source
from fastft.data.pack import best_fit_decreasing
from fastft.data.prepared import OriginsWriter, Prepared, RaggedWriter
from fastft.errors import UserError
from fastft.models.head import FusedHead, install
from fastft.models.isolation import check_isolation
from fastft.ops import cross_entropy
from fastft.tasks.base import TASKS, Batch, Counts, Metrics, Split, Task, counts_dict, write_sizes

log = logging.getLogger(__name__)

IGNORE = -100


@TASKS.register("causal_lm")
class CausalLM(Task):
    """Next-token prediction. Prepared columns: ``tokens`` (a document per row, ending in EOS), ``piece_doc``, ``piece_start``,
    ``piece_length`` (parts of documents no longer than max_length) and ``packs`` (pieces per training sequence)."""

    auto_class = "AutoModelForCausalLM"
    metric_names = ("loss", "perplexity")
    head: FusedHead | None = None  # set by attach

    def build(self, folder: Path, sources: list[Source], training: bool) -> dict:
        counts, tokens, origins = Counts(), RaggedWriter(folder, "tokens"), OriginsWriter(folder)
        pieces = {"piece_doc": array("q"), "piece_start": array("q"), "piece_length": array("q")}
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        characters, document = 0, 0
        for chunk in self.chunks(self.read(sources, [self.config.data.text], counts)):
            texts = [record[self.config.data.text] for _, record in chunk]
            encoded = self.tokenizer(texts, add_special_tokens=True, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            for (where, _), text, ids in zip(chunk, texts, encoded, strict=True):
                ids = ids if end and ids and ids[-1] == end[0] else ids + end
                tokens.append(ids)
                origins.append(where)
                for start, length in self._pieces(where, len(ids), counts):
                    for column, value in zip(pieces.values(), (document, start, length), strict=True):
                        column.append(value)
                characters += len(text)
                document += 1
        documents = tokens.close()
        self.settle_overlength(counts)
        for name, column in pieces.items():
            np.save(folder / f"{name}.npy", np.asarray(column))
        totals = self._write_packs(folder, np.asarray(pieces["piece_length"]))
        return {
            "counts": counts_dict(counts),
            "totals": totals,
            "origins": origins.close(),
            "documents": document,
            "tokens": len(documents.values),
            "characters": characters,
        }

    def _pieces(self, where: str, length: int, counts: Counts) -> list[tuple[int, int]]:
        """(start, length) of the parts a document is used in, by the overlength policy."""
        size = self.max_length
        if length <= size:
            return [(0, length)]
        counts.overlength(where, length)
        match self.config.data.overlength:
            case "truncate":
                counts.truncated += 1
                return [(0, size)]
            case "split":
                counts.split += 1
                # neighbours share one token, so that every token but the document's first is predicted once
                return [(s, min(size, length - s)) for s in range(0, length - 1, size - 1)]
            case "drop":
                counts.dropped += 1
        return []  # drop; and error, which is raised when all is counted

    def _write_packs(self, folder: Path, piece_lengths: np.ndarray) -> dict:
        """The packs and their sizes; returns the totals."""
        writer = RaggedWriter(folder, "packs")
        for pieces in (
            best_fit_decreasing(piece_lengths, self.max_length)
            if self.config.data.packing == "isolated"
            else ([i] for i in range(len(piece_lengths)))
        ):
            writer.append(pieces)
        packs = writer.close()
        lengths = (
            np.add.reduceat(piece_lengths[packs.values], packs.offsets[:-1]) if len(packs) else np.zeros(0, np.int64)
        )  # no pack is empty
        return write_sizes(folder, lengths, lengths - packs.lengths())  # a piece's first token is no target

    def overlength_choices(self) -> list[str]:
        return ["split", "truncate", "drop"]

    def collate(self, split: Split, ids: np.ndarray) -> Batch:
        rows = [self._pack(split.data, int(i)) for i in ids] or [[np.zeros(1, dtype=np.int32)]]
        packed = self.config.data.packing == "isolated"
        width = self.max_length if packed else max(sum(map(len, row)) for row in rows)
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
            positions[r, at:] = np.arange(width - at)  # padding is one more document, which nothing is learnt from
        real = 0 if len(ids) == 0 else int(split.lengths[ids].sum())
        if self._flash():  # its variable-length kernels want one row
            tokens, labels, positions = (a.reshape(1, -1) for a in (tokens, labels, positions))
        inputs = {"input_ids": torch.from_numpy(tokens), "position_ids": torch.from_numpy(positions)}
        # use_cache: with a cache, transformers takes restarting positions for a continued sequence and masks nothing
        return Batch({**inputs, "use_cache": False}, torch.from_numpy(labels), len(ids), real, tokens.size)

    def _pack(self, data: Prepared, pack: int) -> list[np.ndarray]:
        doc, start, length = data["piece_doc"], data["piece_start"], data["piece_length"]
        return [
            data["tokens"][int(doc[p])][int(start[p]) : int(start[p]) + int(length[p])] for p in data["packs"][pack]
        ]

    def documents(self, split: Split, sample: int) -> list[str]:
        data, found = split.data, []
        for p in data["packs"][sample]:
            doc, start, length = (int(data[name][p]) for name in ("piece_doc", "piece_start", "piece_length"))
            whole = start == 0 and length == len(data["tokens"][doc])
            found.append(data.origin(doc) + ("" if whole else f" tokens {start} to {start + length - 1}"))
        return found

    def _flash(self) -> bool:
        return self.config.model.attention == "flash_attention_2"

    def loss(self, outputs, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        logits = outputs.logits.flatten(0, 1)  # (B*T, V)
        return cross_entropy(
            logits,
            batch.labels.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
            token_weight=scale,
            inplace=logits.requires_grad,
            label_smoothing=self.config.loss.label_smoothing,
            z_loss=self.config.loss.z_loss,
        )

    def attach(self, model: torch.nn.Module, device: torch.device) -> dict:
        home = next(model.parameters()).device
        model.to(device)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(
            model.get_input_embeddings().weight.shape[0], (2, min(self.max_length, 16)), generator=generator
        ).to(device)
        self.head, why = install(model, {"input_ids": tokens, "use_cache": False}, self.config.loss.implementation)
        model.to(home)
        chosen = "cross_entropy" if self.head is None else "linear_cross_entropy"
        log.info("loss by %s: %s", chosen, why)
        return {"loss": {"implementation": chosen, "why": why}}

    def forward_loss(self, model, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        if self.head is None:
            return super().forward_loss(model, batch, scale)
        return self.head.loss(
            model,
            batch.inputs,
            batch.labels,
            ignore_index=IGNORE,
            reduction="sum",
            token_weight=scale,
            label_smoothing=self.config.loss.label_smoothing,
            z_loss=self.config.loss.z_loss,
        )

    def forward_metrics(self, model, batch: Batch, metrics: "Perplexity") -> None:
        if self.head is None:
            super().forward_metrics(model, batch, metrics)
        else:
            metrics.add(self.head.loss(model, batch.inputs, batch.labels, ignore_index=IGNORE, reduction="sum"), batch)

    def check_model(self, model: torch.nn.Module, device: torch.device) -> None:
        rows = model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows:
            raise UserError(
                f"The tokenizer knows {len(self.tokenizer)} tokens, the model's embedding has only {rows}.",
                "Use the tokenizer that belongs to the model (model.tokenizer).",
            )
        if self.config.data.packing == "isolated":
            check_isolation(model, min(self.max_length, 16), device, flat=self._flash())

    def new_metrics(self) -> "Perplexity":
        return Perplexity()


class Perplexity(Metrics):
    """Mean negative log-likelihood per target token, and its exponential."""

    def __init__(self):
        self.nll, self.tokens = 0.0, 0

    def update(self, outputs, batch: Batch) -> None:
        logits = outputs.logits.flatten(0, 1)
        self.add(cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"), batch)

    def add(self, nll: torch.Tensor, batch: Batch) -> None:
        """nll: 0-dim, summed over the batch's target tokens."""
        self.nll += float(nll)
        self.tokens += int((batch.labels != IGNORE).sum())

    def state(self) -> tuple[float, int]:
        return self.nll, self.tokens

    @staticmethod
    def finish(states: list) -> dict[str, float]:
        loss = sum(s[0] for s in states) / sum(s[1] for s in states)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": sum(s[1] for s in states)}
