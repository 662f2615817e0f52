"""Training on prepared corpora (``fastft prepare``): tokens are taken from the shards as they are, and only packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastft.corpus.lookup import find
from fastft.corpus.shards import MANIFEST, Corpus
from fastft.data.encoder import Counts, Learned
from fastft.data.prepared import Prepared, Ragged, prepare
from fastft.data.split import Split
from fastft.data.store import Store
from fastft.errors import UserError, did_you_mean
from fastft.files import digest

if TYPE_CHECKING:
    from fastft.tasks._text import TextTask


class Planner(Protocol):
    """An encoder of documents: it packs them by their lengths alone."""

    truncation: str

    def plan(self, store: Store, lengths: np.ndarray, starts: np.ndarray) -> dict: ...
    def settle(self, counts: Counts) -> None: ...


class Joined:
    """Documents of several shards, one behind the other, as one ragged column.

    Parameters
    ----------
    parts : list of Ragged
    before, after : int
        Tokens at either end of every document that are left out.
    """

    def __init__(self, parts: list[Ragged], before: int = 0, after: int = 0):
        self.parts, self.before, self.after = parts, before, after
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, document: int) -> tuple[int, int]:
        """Shard, and document in it."""
        part = int(np.searchsorted(self.starts, document, side="right")) - 1
        return part, document - int(self.starts[part])

    def __getitem__(self, document: int) -> np.ndarray:
        part, row = self.place(document)
        found = self.parts[part][row]
        return found[self.before : len(found) - self.after]

    def lengths(self) -> np.ndarray:
        whole = [np.diff(np.asarray(part.offsets)) for part in self.parts]
        return np.concatenate([np.zeros(0, np.int64), *whole]) - self.before - self.after


class CorpusData(Prepared):
    """Packs of documents that lie in shards of corpora."""

    def __init__(self, folder: Path, shards: list[tuple[Corpus, int]], tokens: Joined):
        super().__init__(folder)
        self.columns |= {"tokens": tokens}  # type: ignore[dict-item]
        self.shards = shards

    def origin(self, document: int) -> str:
        part, row = self["tokens"].place(document)
        corpus, shard = self.shards[part]
        return corpus.where(shard, row)

    def called(self, said: str) -> list[int]:
        """Documents by an id or a place, see ``lookup.find``. UserError where no corpus has one that is read."""
        starts, found, errors = self["tokens"].starts, list[int](), list[UserError]()
        for corpus in {corpus.folder: corpus for corpus, _ in self.shards}.values():
            try:
                at = find(corpus, said)
            except UserError as e:
                errors.append(e)
                continue
            for part, (other, shard) in enumerate(self.shards):
                if other.folder == corpus.folder:
                    found += [int(starts[part]) + row for own, row in at if own == shard]
            if not found:
                errors.append(UserError(f"{corpus.folder}: the source of document {said!r} is not read by this run."))
        if not found:
            raise errors[0]
        return found

    def verify(self) -> None:
        super().verify()
        for corpus in {corpus.folder: corpus for corpus, _ in self.shards}.values():
            corpus.verify()


def open_corpora(
    task: TextTask,
    name: str,
    folders: list[Path],
    planner: Planner,
    learned: Learned | None,
    only: Sequence[str | None],
    bare: bool,
) -> Split:
    """A split of prepared corpora: their tokens, and packs, which are planned once for a run's settings.

    Parameters
    ----------
    only : list of (str or None)
        Of each corpus the source that is read; None: all of them.
    bare : bool
        Whether the special tokens around documents are left out.

    Raises
    ------
    UserError
        Another tokenizer's corpus; one without the source that is asked for; a shard that is not as it was written.
    """
    corpora = [Corpus(folder) for folder in folders]
    mine = task.processor_key()
    for corpus in corpora:
        said = corpus.manifest["tokens"]
        if said["tokenizer"] != mine:
            raise UserError(
                f"{corpus.folder}: was tokenized by another tokenizer ({said['path']}) than this run's "
                f"({task.config.model.tokenizer or task.config.model.path}).",
                "Prepare the corpus with the model's tokenizer, or set model.tokenizer.",
            )
    around = corpora[0].manifest["tokens"] if bare else {"before": [], "after": []}
    for corpus in corpora if bare else ():
        if any(corpus.manifest["tokens"][side] != around[side] for side in ("before", "after")):
            raise UserError(
                f"{corpus.folder}: has other special tokens around its documents than {corpora[0].folder}.",
                "Train on one of them, or prepare both in the same way.",
            )
    chosen = [_shards(corpus, source) for corpus, source in zip(corpora, only, strict=True)]
    shards = [(corpus, shard) for corpus, own in zip(corpora, chosen, strict=True) for shard in own]
    tokens = Joined([corpus.tokens(shard) for corpus, shard in shards], len(around["before"]), len(around["after"]))

    digests = list(dict.fromkeys(corpus.digest for corpus in corpora))

    def build(folder: Path) -> dict:
        for corpus in corpora:  # once: a later start compares sizes and ends
            corpus.verify()
        lengths = tokens.lengths()
        counts = _counts(lengths, task, planner.truncation, tokens, shards)
        planner.settle(counts)
        meta = planner.plan(Store(folder, {}), lengths, tokens.starts[:-1])
        characters = sum(corpus.shards[shard].characters for corpus, shard in shards)
        sums = {"documents": len(lengths), "tokens": int(lengths.sum()), "characters": characters}
        return {"counts": counts.as_dict(), "origins": [], **sums, **meta, "corpus": digests}

    data = task.config.data
    cache = Path(data.cache or Path(task.config.run.dir) / "prepared")
    settings = digest(["corpus", task.preparation_key(learned), *([list(only)] if any(only) else [])])
    made = prepare(cache / name, settings, [str(folder / MANIFEST) for folder in folders], build)
    begins = tokens.starts[np.cumsum([0, *map(len, chosen[:-1])])]
    split = Split(name, CorpusData(made.folder, shards, tokens), begins)
    if not split.totals["targets"]:
        raise UserError(f"data set {name!r} is empty: nothing is left of {folders[0]} to learn from.")
    return split


def _shards(corpus: Corpus, source: str | None) -> list[int]:
    """The shards of a source in a corpus; all of them for None."""
    names = [found["name"] for found in corpus.manifest["sources"]]
    if source is not None and source not in names:
        raise UserError(
            f"{corpus.folder}: has no source {source!r}, but {', '.join(names)}.", did_you_mean(source, names)
        )
    return [i for i, shard in enumerate(corpus.shards) if source in (None, names[shard.source])]


def _counts(
    lengths: np.ndarray, task: TextTask, truncation: str, tokens: Joined, shards: list[tuple[Corpus, int]]
) -> Counts:
    """What becomes of documents that are longer than a sequence, as an encoder counts it."""
    counts = Counts(rows=len(lengths))
    room = task.room
    long = np.flatnonzero(lengths > room)
    for document in long[:3].tolist():
        part, row = tokens.place(document)
        corpus, shard = shards[part]
        counts.too_long(corpus.where(shard, row), int(lengths[document]))
    counts.overlong_total = len(long)
    counts.longest = int(lengths.max(initial=0)) if len(long) else 0
    counts.truncated = len(long) * (truncation == "truncate")
    counts.split = len(long) * (truncation == "split")
    counts.dropped = len(long) * (truncation == "drop")
    return counts


class Words:
    """The unit of masked_lm that each token of a document belongs to. UserError where tokens alone do not say it."""

    def __init__(self, task: TextTask, tokens: Joined):
        self.tokens = tokens
        tokenizer, data = task.tokenizer, task.config.data
        self.begins = np.ones(len(tokenizer), bool)  # tokens that begin one
        if not data.whole_words:
            return
        model: Any = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
        if type(model).__name__ != "WordPiece" or data.chinese_words == "jieba":
            raise UserError(
                "data.whole_words: a prepared corpus holds no words; only tokens of WordPiece say where one begins.",
                "Set data.whole_words: false (and data.chinese_words: none), or train on the files themselves.",
            )
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.begins = np.array([not str(name).startswith(model.continuing_subword_prefix) for name in names])

    def __getitem__(self, document: int) -> np.ndarray:
        return np.cumsum(self.begins[self.tokens[document]])
