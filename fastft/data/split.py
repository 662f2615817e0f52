"""A split from its sources: which files, whether they may be read, how they are encoded, and what the loop sees of
it.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastft.config import Data, Run, Source
from fastft.data import formats
from fastft.data.encoder import Again, Encoder, Learned
from fastft.data.encoding import encode
from fastft.data.prepared import Prepared, prepare
from fastft.data.sources import holds
from fastft.errors import UserError
from fastft.files import digest

log = logging.getLogger(__name__)


class Split:
    """A prepared set: what the loop needs to know of every sequence, without touching its tokens.

    Attributes
    ----------
    lengths : (n,) int64, memory-mapped
        Tokens of each sequence before padding.
    sizes : (n,) or (n, parts) int64, memory-mapped
        The same, by the parts that are padded each by itself (source and target); ``lengths`` where there is one.
    targets : (n,) float64, memory-mapped
        What each sequence contributes to the loss's denominator (target tokens, or 1 per classified text).
    totals : dict
        ``tokens`` and ``targets``, summed, and ``longest``; see ``write_sizes``.
    starts : (sources,) int64 or None
        The document, or the sample where a sample is no pack, at which each source begins; None: it was read as one.
    """

    def __init__(self, name: str, data: Prepared, starts: np.ndarray | None = None):
        self.name, self.data = name, data
        self.starts = np.asarray(data.meta["sources"], np.int64) if "sources" in data.meta else starts
        self.lengths, self.targets, self.totals = data["lengths"], data["targets"], data.meta["totals"]
        self.sizes = data["sizes"] if "sizes" in data.columns else self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def sample_starts(self) -> np.ndarray:
        """(sources + 1,) int64: the sample at which each source begins, and the number of samples."""
        assert self.starts is not None, "the sources were read as one"
        starts = self.starts.tolist()
        if "packs" in self.data.columns:
            packs, document = self.data["packs"], self.data["piece_doc"]
            starts = [bisect_left(range(len(self)), s, key=lambda i: document[packs[i][0]]) for s in starts]
        return np.append(np.asarray(starts, np.int64), len(self))


def open_split(
    name: str,
    sources: Sequence[Source],
    encoder: Encoder,
    key: dict,
    learned: Learned | None,
    data: Data,
    run: Run,
    apart: bool = False,
) -> Split:
    """Prepare a split, or open what was prepared from the same files, settings and tokenizer.

    Parameters
    ----------
    key : dict
        What the encoder's result depends on beside the files, as JSON.
    learned : dict or None
        What the training set taught, for an evaluation set.
    apart : bool
        Whether no pack crosses a source, and the split knows where each begins: for a mixture.

    Raises
    ------
    UserError
        A bad row, a set without anything to learn from, a source folder that holds what the run writes.
    """
    if "/" in name or "\\" in name:
        raise UserError(
            f"data.eval: {name.removeprefix('eval-')!r} is no name for a set: it becomes a folder's name.",
            "Use a name without slashes.",
        )
    cache = Path(data.cache or Path(run.dir) / "prepared")
    _check_folders(name, sources, Path(run.dir), cache)
    files = _files(sources)
    if others := [str(file) for source in sources for file in formats.not_read(source)]:
        log.warning(
            "data set %r: no data, not read: %s (a file is read when it is named)", name, ", ".join(others[:10])
        )
    read_as = [formats.format_of(Path(f)) for f in files]  # a name decides it, where a source says nothing
    settings = digest([key, [_source_key(source) for source in sources], read_as, *(["apart"] if apart else [])])

    def build(folder: Path) -> dict:
        try:
            meta = encode(folder, encoder, sources, learned, apart, data.workers)
        except Again as e:
            log.warning("data set %r: %s: all rows are encoded anew", name, e)
            encoder.again()
            meta = encode(folder, encoder, sources, learned, apart, data.workers)
        if came := set(_files(sources)) ^ set(files):
            raise UserError(
                f"{min(came)}: came or went while the data was read.", "Run again when nothing writes to it any more."
            )
        return meta

    split = Split(name, prepare(cache / name, settings, files, build))
    if not split.totals["targets"]:
        counts = split.data.meta["counts"]
        said = (
            ", ".join(f"{k.replace('_', ' ')} {n:,}" for k, n in counts.items() if n and isinstance(n, int)) or "none"
        )
        read = f"{counts['rows']} rows read from {', '.join(files[:3])}"
        raise UserError(f"data set {name!r} is empty: {read}, nothing left to learn from.", f"Of them were: {said}.")
    return split


def _check_folders(name: str, sources: Sequence[Source], run_dir: Path, cache: Path) -> None:
    for folder in (path for source in sources if source.path and (path := Path(source.path)).is_dir()):
        own = {"run.dir": run_dir, **({"data.cache": cache} if formats.hf.is_saved_dataset(folder) else {})}
        if inside := [key for key, path in own.items() if holds(folder, path)]:
            raise UserError(
                f"data set {name!r}: the folder {folder} holds {inside[0]} ({own[inside[0]]}): "
                "the run would read what it writes.",
                f"Put {inside[0]} elsewhere, or name the files to read one by one.",
            )


def _files(sources: Sequence[Source]) -> list[str]:
    return [str(file) for source in sources for file in formats.files_of(source)]


# What fastft 0.1.0 put into the key of prepared data, at its defaults: it stays in it, whichever task has it, so that
# data and checkpoints of then are still known. What was added since is in the key only where it is not at its default.
SOURCE_KEY_0_1 = ("format", "split", "documents", "header", "quoting")
DATA_KEY_0_1 = {
    "overlength": "error",
    "packing": "isolated",
    "text": "text",
    "text_pair": None,
    "label": "label",
    "multi_label": False,
    "label_separator": ",",
    "labels": None,
}
NO_PART_OF_THE_KEY = {"train", "eval", "cache", "seed", "max_length", "order", "curriculum", "workers"}


def data_key(data: Data) -> dict:
    """The part of a preparation key that follows from the ``data`` section."""
    values = data.model_dump(exclude=NO_PART_OF_THE_KEY)
    defaults = {name: field.get_default(call_default_factory=True) for name, field in type(data).model_fields.items()}
    changed = {name: value for name, value in values.items() if name not in DATA_KEY_0_1 and value != defaults[name]}
    changed.pop("truncation", None)
    values["overlength"] = values["truncation"]
    return {name: values.get(name, default) for name, default in DATA_KEY_0_1.items()} | changed


def _source_key(source: Source) -> dict:
    fields = type(source).model_fields
    values = source.model_dump(exclude={"path", "source", "weight", "epochs", *(["name"] if source.path else [])})
    return {k: v for k, v in values.items() if k in SOURCE_KEY_0_1 or v != fields[k].default}
