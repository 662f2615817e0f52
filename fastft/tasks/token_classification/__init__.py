"""Token classification (named entities, parts of speech): a tag for every word, with encoder or decoder models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config import Config, Data, Loss, Section
from fastft.data.encoder import Learned, check_text
from fastft.data.split import Split
from fastft.errors import UserError
from fastft.inference.base import Predictor
from fastft.lazy import torch
from fastft.models import load
from fastft.objectives.base import Objective, OutputsObjective
from fastft.tasks._text import TextTask, padded
from fastft.tasks.base import IGNORE, Batch, Draw, Metric, ModelSpec, SampleMetrics
from fastft.tasks.token_classification import alignment, schemes
from fastft.tasks.token_classification.encoder import TagEncoder

if TYPE_CHECKING:
    from fastft.ranks import Ranks

HEADS = ("classifier", "score")


class TokenData(Data):
    """Sentences as lists of words, with a list of tags each."""

    tokens: str = Field("tokens", description="Column of the words: a list per row.")
    tags: str = Field("tags", description="Column of the tags: a list per row, as long as that of the words.")
    labels: list[str] | None = Field(
        None, description="The tags' names, in the order of the numbers that stand for them."
    )
    scheme: Literal["auto", "iob2", "iob1", "bioes", "raw"] = Field(
        "auto", description="How tags mark entities; raw: the type alone; auto: found out from the training data."
    )
    label_pieces: Literal["first", "all"] = Field(
        "first",
        description="Which tokens of a word have a target: the first, or all (B- becomes I- on the later ones).",
    )


class TokenLoss(Loss):
    """Cross-entropy over the tags, mean over the target tokens."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all tags.")


class TokenOptions(Section):
    """How words are tagged."""

    max_length: int | None = Field(
        None, ge=8, description="Longer sentences are read in windows of so many tokens; default: the run's."
    )


@dataclass
class TokenBatch(Batch):
    """A batch that knows its words.

    Attributes
    ----------
    windows : list of (sentence, positions, words, tags)
        Per row: the sentence's index; where in the row a word's first token is, (n,); which word that is, (n,); and
        the label of every word of the sentence.
    """

    windows: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)


@rooms.TASKS.register("token_classification")
class TokenClassification(TextTask):
    """Prepared columns, per window (a sentence, or a part of one): ``tokens``; ``words``, the index of each token's
    word in the sentence, -1 at special tokens; ``tags`` of all the sentence's words, as indices into the meta's "tags";
    ``sentence``, its index."""

    Data = TokenData
    Loss = TokenLoss
    Predict = TokenOptions
    auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: Config):
        super().__init__(config)
        self.data: Any = config.data
        self.label_smoothing: float = config.loss.label_smoothing

    @cached_property
    def tokenizer(self) -> Any:
        return alignment.for_words(
            load.tokenizer(self.config.model), self.config.model.tokenizer or self.config.model.path
        )

    @cached_property
    def special(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a sequence."""
        return alignment.special_tokens(self.tokenizer)

    def encoder(self, learned: Learned | None) -> TagEncoder:
        return TagEncoder(self, learned)

    def learned(self, split: Split) -> Learned:
        names = split.data.meta["labels"]
        if len(names) < 2:
            raise UserError(
                f"data.train: all words of {len(split)} sentences have the same tag {names[0]!r}.",
                "Token classification needs at least two.",
            )
        return {"labels": names, "scheme": split.data.meta["scheme"]}

    def learned_of_model(self) -> Learned:
        names = self.output_names("token classifier")
        marked = all(name == schemes.OUTSIDE or schemes.PREFIXED.fullmatch(name) for name in names)
        return {"labels": names, "scheme": getattr(self.model_config, "tag_scheme", "iob2" if marked else "raw")}

    def model(self, learned: Learned) -> ModelSpec:
        overrides = self.named_outputs(learned["labels"], tag_scheme=learned["scheme"])
        return ModelSpec(self.auto_class, HEADS, overrides)

    @classmethod
    def fits(cls, model_config: Any) -> bool:
        return any("ForTokenClassification" in a for a in model_config.architectures or [])

    def check_model(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        from fastft.models.trial import SHORT, check_runs

        super().check_model(forward, model, device)
        self.unpad(forward, model, self.inputs, device)
        width = self.width([range(min(SHORT, self.max_length))])
        check_runs(forward, model, lambda n: self.inputs([np.arange(n) % 8]), width, self.max_length, device)

    def documents(self, split: Split, sample: int) -> list[str]:
        words = split.data["words"][sample]
        words, total = words[words >= 0], len(split.data["tags"][sample])
        whole = words[0] == 0 and words[-1] == total - 1
        return [split.data.origin(sample) + ("" if whole else f" words {words[0]} to {words[-1]}")]

    def inputs(self, rows: list[np.ndarray]) -> dict[str, Any]:
        """input_ids and attention_mask, both (len(rows), longest) int64; with ``places``."""
        width = self.width(rows)
        mask = padded([np.ones(len(row)) for row in rows], 0, width=width)
        tokens = padded(rows, self.tokenizer.pad_token_id, width=width)
        shown = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
        return {**shown, **self.places(mask - 1)}

    def collate(self, split: Split, ids: np.ndarray, draw: Draw) -> TokenBatch:
        data = split.data
        if len(ids) == 0:  # a dummy row, without targets
            row = np.full(1, self.tokenizer.pad_token_id)
            return TokenBatch(self.inputs([row]), torch.full((1, 1), IGNORE), 0, 0, 1)
        label, later = self._tables(data.meta)
        rows, labels, found = [], [], []
        for i in map(int, ids):
            words, tags = data["words"][i], label[data["tags"][i]]
            real = np.flatnonzero(words >= 0)
            first = real[np.diff(words[real], prepend=-1) != 0]
            target = np.full(len(words), IGNORE, np.int64)
            if self.data.label_pieces == "all":
                target[real] = later[tags[words[real]]]
            target[first] = tags[words[first]]
            rows.append(data["tokens"][i])
            labels.append(target)
            found.append((int(data["sentence"][i]), first, np.asarray(words[first]), tags))
        inputs = self.inputs(rows)
        real_tokens = sum(map(len, rows))
        tensor = torch.from_numpy(padded(labels, IGNORE, width=self.width(labels)))
        computed = tensor.numel() if self.pads else real_tokens
        return TokenBatch(inputs, tensor, len(ids), real_tokens, computed, windows=found)

    def _tables(self, meta: dict) -> tuple[np.ndarray, np.ndarray]:
        """Label by the prepared column's index; and the label of a word's later tokens by that of its first."""
        index = {name: i for i, name in enumerate(meta["labels"])}
        # An I- tag that is missing is needed for label_pieces: all only, which the encoder sees to.
        later = [index.get(schemes.later_piece(name, meta["scheme"]), i) for name, i in index.items()]
        return np.array([index[name] for name in meta["tags"]]), np.array(later)

    def loss(self, outputs: Any, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, summed over the target tokens."""
        from fastft.ops import cross_entropy

        options: dict[str, Any] = {"ignore_index": IGNORE, "reduction": "sum", "token_weight": scale}
        options["label_smoothing"] = self.label_smoothing
        return cross_entropy(outputs.logits.flatten(0, 1), batch.labels.flatten(), **options)

    @staticmethod
    def row_losses(outputs: Any, batch: Batch) -> torch.Tensor:
        """(rows,) float32: each row's cross-entropy, summed over its target tokens, without smoothing."""
        from fastft.ops import cross_entropy

        return cross_entropy(outputs.logits, batch.labels, ignore_index=IGNORE, reduction="none").sum(1)

    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        return OutputsObjective(self.loss)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("loss", lower_is_better=True), *map(Metric, ("precision", "recall", "f1", "accuracy")))

    def new_metrics(self, objective: Objective, learned: Learned) -> EntityMetrics:
        return EntityMetrics(self, learned)

    def predictor(self, model: torch.nn.Module, learned: Learned, options: TokenOptions) -> Predictor:
        return Tagger(self, model, learned, options)


class Window(NamedTuple):
    """A part of a sentence, as an evaluation saw it: its words, their labels, the tags of all words of the sentence,
    the loss summed over its target tokens and their number, and its place in the order of its rank.
    """

    sentence: int
    words: np.ndarray
    predicted: np.ndarray
    tags: np.ndarray
    loss: float
    targets: int
    place: int


class EntityMetrics(SampleMetrics):
    """precision, recall and f1 of entities (micro), accuracy of words, over whole sentences.

    A word that the model did not see (it has no token, or was cut away) counts as predicted O.
    """

    def __init__(self, task: TokenClassification, learned: Learned):
        self.task, self.names, self.scheme = task, learned["labels"], learned["scheme"]
        self.windows: list[Window] = []

    def update(self, model: Callable, batch: Batch) -> None:
        assert isinstance(batch, TokenBatch)
        outputs = model(**batch.inputs)
        if batch.tokens == 0:
            return
        losses, targets = self.task.row_losses(outputs, batch).tolist(), (batch.labels != IGNORE).sum(1).tolist()
        predicted = outputs.logits.argmax(-1).cpu().numpy()
        for row, (sentence, positions, words, tags), loss, n in zip(
            predicted, batch.windows, losses, targets, strict=True
        ):
            self.windows.append(Window(sentence, words, row[positions], tags, loss, n, len(self.windows)))

    def state(self) -> list:
        return self.windows

    def bring_together(self, ranks: Ranks) -> None:
        """A sentence to the first rank that has a window of it."""
        every = ranks.gather(self.windows)
        before = {window.sentence for part in every[: ranks.rank] for window in part}
        own = {window.sentence for window in self.windows} - before
        others = [window for r, part in enumerate(every) if r != ranks.rank for window in part]
        self.windows = [window for window in (*self.windows, *others) if window.sentence in own]

    def columns(self) -> dict[str, np.ndarray]:
        return self.joined([self.windows])

    def joined(self, states: list) -> dict[str, np.ndarray]:
        """A row per sentence, whose windows may have been with several ranks."""
        windows = [window for state in states for window in state]
        if not windows:
            return {}
        order, expected, found = self._sentences(windows)
        place = {sentence: i for i, sentence in enumerate(order)}
        loss, targets = np.zeros(len(order)), np.zeros(len(order), np.int64)
        for window in windows:
            loss[place[window.sentence]] += window.loss
            targets[place[window.sentence]] += window.targets
        right = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(expected, found, strict=True)]
        return {
            "loss": loss,
            "targets": targets,
            "entities": schemes.counts(expected, found, self.scheme),
            "right": np.array(right),
            "words": np.array([len(tags) for tags in expected]),
        }

    def numbers(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        words = int(columns["words"].sum())
        loss = float(columns["loss"].sum() / columns["targets"].sum())
        result = {"loss": loss, "sentences": len(columns["words"]), "words": words}
        entities = schemes.of_counts(*columns["entities"].sum(0).tolist())
        return {**result, **entities, "accuracy": float(columns["right"].sum()) / words}

    def _sentences(self, windows: list) -> tuple[list[int], list[list[str]], list[list[str]]]:
        """Their numbers, ascending, and the tags of each: expected, predicted."""
        truth: dict[int, np.ndarray] = {}
        guess: dict[int, np.ndarray] = {}
        for window in windows:
            truth[window.sentence] = window.tags
            guess.setdefault(window.sentence, np.full(len(window.tags), -1))[window.words] = window.predicted
        names = [*self.names, schemes.OUTSIDE]  # the last for -1
        order = sorted(truth)
        expected, found = ([[names[i] for i in rows[s]] for s in order] for rows in (truth, guess))
        return order, expected, found

    def judged(self, learned: Learned) -> list[tuple[int, dict]]:
        """``gold`` and ``predicted``: the tags of a sentence's words."""
        first = {window.sentence: window.place for window in reversed(self.windows)}
        sentences = zip(*self._sentences(self.windows), strict=True)
        return [(first[sentence], {"gold": gold, "predicted": tags}) for sentence, gold, tags in sentences]

    def error_of(self, judged: dict[str, Any]) -> float:
        """Words with a wrong tag."""
        return float(sum(a != b for a, b in zip(judged["gold"], judged["predicted"], strict=True)))

    def by_class(self, states: list, learned: Learned) -> dict[str, dict[str, float]]:
        """Of entities, by their type."""
        _, expected, found = self._sentences([window for state in states for window in state])
        return schemes.scores_by_type(expected, found, self.scheme)


class Tagger(Predictor):
    """``tokens``, ``tags`` and ``entities``: type, start and end (words; the end is the first word after it), text.

    A row's ``tokens`` are a list of words, or a text: split at white space, or, when it has none and is written in
    Chinese characters or kana, into characters. What is longer than the limit is read in ``windows``, whose number is
    then given.
    """

    def __init__(self, task: TokenClassification, model: torch.nn.Module, learned: Learned, options: TokenOptions):
        self.model: Any = model
        self.task, self.names, self.scheme = task, learned["labels"], learned["scheme"]
        self.limit = min(options.max_length or task.max_length, task.max_length)
        self.fields = {"tokens": task.data.tokens}

    def prepare(self, where: str, row: dict[str, Any]) -> dict[str, Any]:
        value = row.get("tokens", row.get("text"))
        glue = " "
        if isinstance(value, str):
            super().prepare(where, {"text": value})
            glue = "" if alignment.is_unspaced(value) else " "
            value = value.split() if glue else list(value)
        if not isinstance(value, list) or not value:
            raise UserError(f"{where}: the tokens are {value!r}.", "Give a list of words, or a text.")
        for word in value:
            check_text(where, "tokens", word)
        return {"tokens": value, "glue": glue}

    def run(self, rows: list[dict[str, Any]]) -> list[dict]:
        before, after = self.task.special
        sentences = [row["tokens"] for row in rows]
        found: list[tuple[int, alignment.Pieces]] = []
        for i, pieces in enumerate(alignment.pieces_of(self.task.tokenizer, sentences)):
            free = np.zeros(len(sentences[i]), bool)
            found += [(i, part) for part in alignment.windows(pieces, self.limit - len(before) - len(after), free)]
        tags = [[schemes.OUTSIDE] * len(words) for words in sentences]
        windows = np.bincount([i for i, _ in found], minlength=len(rows))
        for (i, part), row in zip(found, self._predicted([[*before, *p.ids, *after] for _, p in found]), strict=True):
            first = np.flatnonzero(np.diff(part.words, prepend=-1))
            for word, label in zip(part.words[first], row[first + len(before)], strict=True):
                tags[i][word] = self.names[label]
        return [self._record(row, tags[i], int(windows[i])) for i, row in enumerate(rows)]

    def _predicted(self, rows: list[list[int]]) -> np.ndarray:
        """(rows, longest) label indices."""
        if not rows:
            return np.zeros((0, 0), np.int64)
        inputs = self.task.inputs([np.asarray(row) for row in rows])
        logits = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()}).logits
        return logits.argmax(-1).cpu().numpy()

    def _record(self, row: dict[str, Any], tags: list[str], windows: int) -> dict:
        words, glue = row["tokens"], row["glue"]
        spans = [
            {"type": kind, "start": start, "end": end, "text": glue.join(words[start:end])}
            for kind, start, end in schemes.entities(tags, self.scheme)
        ]
        more = {"windows": windows} if windows > 1 else {}
        return {"tokens": words, "tags": tags, "entities": spans, **more}
