"""Text classification, single- or multi-label, one text or a pair, with encoder or decoder models."""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastft.config import Source
from fastft.data.formats.base import open_text
from fastft.data.prepared import OriginsWriter, RaggedWriter
from fastft.errors import UserError, did_you_mean
from fastft.models import load
from fastft.ops import cross_entropy
from fastft.tasks.base import TASKS, Batch, Counts, Metrics, Split, Task, counts_dict, write_sizes

IGNORE = -100


@TASKS.register("classification")
class Classification(Task):
    """Prepared columns: ``tokens``, ``segments`` (token types, pairs only), and ``labels``: (n,) int64 class indices, or
    (n, classes) float32 of 0 and 1 when multi_label. meta["labels"] holds the names, in index order."""

    auto_class = "AutoModelForSequenceClassification"
    new_parameters = (
        "classifier",
        "score",
        "pooler",
        "pre_classifier",
        "classification_head",
        "sequence_summary",
        "logits_proj",
    )

    def __init__(self, config):
        super().__init__(config)
        self.metric_names = ("loss", "accuracy", "f1_macro", *(["f1_micro"] if config.data.multi_label else []))
        if config.data.overlength == "split":
            raise UserError(
                "data.overlength: split makes no sense for classification (a label belongs to the whole text).",
                "Choose truncate, drop or error.",
            )
        loss = config.loss
        if config.data.multi_label and (loss.label_smoothing or loss.z_loss):
            raise UserError(
                "loss.label_smoothing and loss.z_loss belong to a softmax; with data.multi_label every label has a loss of its own.",
                "Remove them.",
            )
        if loss.implementation == "linear_cross_entropy":
            raise UserError(
                "loss.implementation: linear_cross_entropy is for language models; a classifier's logits are few.",
                "Remove it.",
            )
        self.labels: list[str] | None = self._labels_file()

    def _labels_file(self) -> list[str] | None:
        if self.config.data.labels is None:
            return None
        path = Path(self.config.data.labels)
        if not path.is_file():
            raise UserError(f"data.labels: no such file: {path}.", "One label name per line.")
        try:
            with open_text(path) as f:
                names = [line.strip() for line in f if line.strip()]
        except (OSError, EOFError, UnicodeDecodeError) as e:
            raise UserError(f"data.labels: {path}: {e}", "It must be UTF-8 text, one label name per line.") from None
        if not names:
            raise UserError(f"data.labels: {path} is empty.", "One label name per line.")
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"data.labels: {path} names {', '.join(sorted(twice))} twice.")
        return names

    def state(self) -> dict:
        return {"labels": self.labels}

    def load_state(self, state: dict) -> None:
        self.labels = state["labels"]

    def state_of_model(self) -> dict:
        names = [self.model_config.id2label[i] for i in range(len(self.model_config.id2label))]
        if not any("ForSequenceClassification" in a for a in self.model_config.architectures or []):
            raise UserError(
                f"model path {self.config.model.path}: is not a trained classifier.",
                "Give a model that fastft exported (<run.dir>/model), or train one first.",
            )
        return {"labels": names}

    def preparation_key(self, training: bool) -> dict:
        return {
            **super().preparation_key(training),
            "labels": None if training and self.config.data.labels is None else self.labels,
        }

    def build(self, folder: Path, sources: list[Source], training: bool) -> dict:
        data, counts = self.config.data, Counts()
        columns = [data.text, data.label] + ([data.text_pair] if data.text_pair else [])
        tokens = RaggedWriter(folder, "tokens")
        segments = RaggedWriter(folder, "segments") if data.text_pair else None
        origins = OriginsWriter(folder)
        found: list[tuple[str, list[str]]] = []
        texts = [data.text] + ([data.text_pair] if data.text_pair else [])
        for chunk in self.chunks(self.read(sources, columns, counts, texts)):
            encoded = self._encode([r for _, r in chunk])
            for i, (where, record) in enumerate(chunk):
                row = self._fit(where, record, {column: values[i] for column, values in encoded.items()}, counts)
                if row is None:
                    continue
                tokens.append(row["input_ids"])
                origins.append(where)
                if segments:
                    segments.append(row["token_type_ids"])
                found.append((where, self._labels_of(where, record[data.label])))
        lengths = tokens.close().lengths()
        if segments:
            segments.close()
        self.settle_overlength(counts)
        names = self.labels if self.labels is not None else (_label_names(found) if training else None)
        assert names is not None, "an evaluation set is prepared before its training set"
        np.save(folder / "labels.npy", self._indices(found, names))
        return {
            "counts": counts_dict(counts),
            "totals": write_sizes(folder, lengths, np.ones(len(lengths), np.int64)),
            "labels": names,
            "origins": origins.close(),
        }

    def _encode(self, records: list[dict], **truncation) -> dict[str, list[list[int]]]:
        texts = [r[self.config.data.text] for r in records]
        if self.config.data.text_pair is None:
            return self.tokenizer(texts, verbose=False, **truncation)
        pairs = [r[self.config.data.text_pair] for r in records]
        return self.tokenizer(texts, pairs, verbose=False, return_token_type_ids=True, **truncation)

    def _fit(self, where: str, record: dict, row: dict[str, list[int]], counts: Counts) -> dict[str, list[int]] | None:
        """The row, or what the overlength policy makes of it; None: not used."""
        length = len(row["input_ids"])
        if length <= self.max_length:
            return row
        counts.overlength(where, length)
        if self.config.data.overlength == "truncate":  # the tokenizer knows which special tokens must stay
            counts.truncated += 1
            return {k: v[0] for k, v in self._encode([record], truncation=True, max_length=self.max_length).items()}
        counts.dropped += self.config.data.overlength == "drop"
        return None

    def _labels_of(self, where: str, value: object) -> list[str]:
        """The label names of a cell: one, or any number when multi_label."""
        if (
            value is None
            or value != value
            or (isinstance(value, str) and not value.strip() and not self.config.data.multi_label)
        ):  # None, NaN, nothing
            raise UserError(f"{where}: the label is empty.", "Every row needs a label; remove the row or mend it.")
        if not self.config.data.multi_label:
            if isinstance(value, (list, dict)):
                raise UserError(
                    f"{where}: the label is a {type(value).__name__}.",
                    "Set data.multi_label: true for several labels per row.",
                )
            return [_name(value)]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(self.config.data.label_separator) if part.strip()]
        labels = value if isinstance(value, list) else [value]
        if wrong := [v for v in labels if v is None or v != v or isinstance(v, (list, dict))]:
            raise UserError(
                f"{where}: {wrong[0]!r} among the labels is no label.",
                "A label is a string or a number; mend or remove the row.",
            )
        return [_name(v) for v in labels]

    def _indices(self, found: list[tuple[str, list[str]]], names: list[str]) -> np.ndarray:
        index = {name: i for i, name in enumerate(names)}
        # A file of names: rows may hold 0-based indices into it, unless a name is a number itself and 1 could mean either.
        nameless = all(
            name == f"LABEL_{i}" for i, name in enumerate(names)
        )  # as transformers calls the classes of a model that names none
        if nameless or (self.config.data.labels is not None and not any(map(_is_number, names))):
            index = {**{str(i): i for i in range(len(names))}, **index}
        out = (
            np.zeros((len(found), len(names)), dtype=np.float32)
            if self.config.data.multi_label
            else np.zeros(len(found), dtype=np.int64)
        )
        for row, (where, labels) in enumerate(found):
            for label in labels:
                if label not in index:
                    origin = "the labels file" if self.config.data.labels else "the training data"
                    raise UserError(
                        f"{where}: label {label!r} does not occur in {origin} ({len(names)} labels).",
                        did_you_mean(label, names),
                    )
                if self.config.data.multi_label:
                    out[row, index[label]] = 1
                else:
                    out[row] = index[label]
        return out

    def train_split(self) -> Split:
        split = super().train_split()
        self.labels = split.data.meta["labels"]
        if not self.labels:
            raise UserError(
                f"data.train: no row of {len(split)} has a label.", "Set data.label to the column of the labels."
            )
        if len(self.labels) < 2 and not self.config.data.multi_label:
            raise UserError(
                f"data.train: all {len(split)} rows have the same label {self.labels[0]!r}.",
                "Classification needs at least two.",
            )
        return split

    def model_overrides(self) -> dict:
        kind = "multi_label_classification" if self.config.data.multi_label else "single_label_classification"
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {n: i for i, n in enumerate(self.labels)},
            "problem_type": kind,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def documents(self, split: Split, sample: int) -> list[str]:
        return [split.data.origin(sample)]

    def check_model(self, model: torch.nn.Module, device: torch.device) -> None:
        self.takes_segments = load.takes(model, "token_type_ids")

    def collate(self, split: Split, ids: np.ndarray) -> Batch:
        data = split.data
        rows = [data["tokens"][int(i)] for i in ids] or [np.full(1, self.tokenizer.pad_token_id, dtype=np.int32)]
        width = max(len(row) for row in rows)
        tokens = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for r, row in enumerate(rows):
            tokens[r, : len(row)] = row
            mask[r, : len(row)] = 1
        inputs = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
        if "segments" in data.columns and self.takes_segments:
            segments = np.zeros((len(rows), width), dtype=np.int64)
            for r, i in enumerate(ids):
                segments[r, : len(data["segments"][int(i)])] = data["segments"][int(i)]
            inputs["token_type_ids"] = torch.from_numpy(segments)
        labels = torch.from_numpy(np.asarray(data["labels"][np.asarray(ids, dtype=np.int64)]))
        if len(ids) == 0:  # a dummy row: ignored class, or NaN-free zeros that the loss weighs with 0
            labels = torch.full((1,), IGNORE) if labels.dim() == 1 else torch.full((1, labels.shape[1]), float("nan"))
        return Batch(inputs, labels, len(ids), int(mask.sum()) if len(ids) else 0, tokens.size)

    def loss(self, outputs, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        logits = outputs.logits
        if batch.labels.dim() == 1:
            return cross_entropy(
                logits,
                batch.labels,
                ignore_index=IGNORE,
                reduction="sum",
                token_weight=scale,
                label_smoothing=self.config.loss.label_smoothing,
                z_loss=self.config.loss.z_loss,
            )
        used = ~batch.labels.isnan()
        losses = F.binary_cross_entropy_with_logits(logits.float(), batch.labels.nan_to_num(), reduction="none")
        return (losses * used).sum() * scale / batch.labels.shape[1]

    def new_metrics(self) -> "ClassificationMetrics":
        return ClassificationMetrics(self)


class ClassificationMetrics(Metrics):
    """Accuracy and macro F1; for multi-label: micro and macro F1, and the share of rows with every label right."""

    def __init__(self, task: Classification):
        self.task, self.loss, self.logits, self.labels = task, 0.0, [], []

    def update(self, outputs, batch: Batch) -> None:
        if batch.tokens == 0:
            return
        one = torch.ones((), dtype=torch.float32, device=outputs.logits.device)
        self.loss += float(self.task.loss(outputs, batch, one))
        self.logits.append(outputs.logits.float().cpu().numpy())
        self.labels.append(batch.labels.cpu().numpy())

    def state(self) -> tuple:
        return self.loss, self.logits, self.labels

    @staticmethod
    def finish(states: list) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        logits = np.concatenate([x for s in states for x in s[1]])
        labels = np.concatenate([x for s in states for x in s[2]])
        result = {"loss": sum(s[0] for s in states) / len(labels), "examples": len(labels)}
        if labels.ndim == 1:
            predicted = logits.argmax(-1)
            return {
                **result,
                "accuracy": float(accuracy_score(labels, predicted)),
                "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
            }
        predicted = logits > 0  # probability above one half
        return {
            **result,
            "accuracy": float((predicted == (labels > 0.5)).all(-1).mean()),
            "f1_micro": float(f1_score(labels, predicted, average="micro", zero_division=0)),
            "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        }


def _name(value: object) -> str:
    """Labels are strings; whole numbers lose a trailing .0 (Parquet and JSON write 3.0 for 3)."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _label_names(found: list[tuple[str, list[str]]]) -> list[str]:
    """All labels, sorted; numerically when all are whole numbers, so that index and name agree."""
    names = {label for _, labels in found for label in labels}
    return sorted(names, key=int) if all(map(_is_number, names)) else sorted(names)


def _is_number(name: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", name) is not None
