"""Data sets of Hugging Face ``datasets``: saved ones (``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``), and
those of the hub, by name, through its cache.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastft.data.formats.base import FORMATS, ArrowRow, rows_of_batch
from fastft.errors import UserError, did_you_mean

BATCH = 1000  # rows converted at a time


def is_saved_dataset(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


@FORMATS.register("hf")
def read(path, source):
    import datasets

    if not is_saved_dataset(path):
        raise UserError(
            f"{path}: not a data set saved by Dataset.save_to_disk.",
            "It must hold dataset_info.json or dataset_dict.json.",
        )
    yield from _rows(_split_of(datasets.load_from_disk(str(path)), str(path), source.split), str(path))


def read_hub(source: Any) -> Iterator[tuple[str, Any]]:
    """Records of a source that names a data set of the hub."""
    where = source.dataset + (f" ({source.name})" if source.name else "")
    yield from _rows(_of_hub(source.dataset, source.name, source.revision, source.split), where)


def hub_files(source: Any) -> list[Path]:
    """The files of the cache that hold it."""
    found = _of_hub(source.dataset, source.name, source.revision, source.split)
    return [Path(file["filename"]) for file in found.cache_files]


@functools.cache
def _of_hub(dataset: str, name: str | None, revision: str | None, split: str | None) -> Any:
    import datasets

    if Path(dataset).expanduser().exists() or "/" not in dataset:  # datasets would read files here, and for csv all
        raise UserError(
            f"dataset {dataset}: is no name on the hub: owner/name.",
            f"Data of this machine have a path: {{path: {dataset}}}.",
        )
    try:
        found = datasets.load_dataset(dataset, name, revision=revision)
    except Exception as e:  # its own, the hub's, requests', and those of a data set's reader
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise UserError(
            f"dataset {dataset}{f' ({name})' if name else ''}: cannot be had: {reason}",
            "Check its name, configuration and revision; without a network only data sets in the cache "
            "(HF_DATASETS_CACHE) can be read.",
        ) from None
    return _split_of(found, dataset, split)


def _split_of(data: Any, where: str, split: str | None) -> Any:
    import datasets

    if not isinstance(data, datasets.DatasetDict):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split is None:
        raise UserError(f"{where}: holds several splits ({', '.join(data)}).", "Name one, for example split: train.")
    if split not in data:
        raise UserError(f"{where}: no split {split!r}.", did_you_mean(split, data))
    return data[split]


def _rows(data: Any, where: str) -> Iterator[tuple[str, Any]]:
    import datasets

    classes = {}  # column -> its ClassLabel; also where every row holds a list of them
    for name, feature in data.features.items():
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
        if isinstance(inner, datasets.ClassLabel):
            classes[name] = inner
    row = 0
    for batch in data.with_format("arrow").iter(BATCH):
        for record in rows_of_batch(batch):
            row += 1
            yield f"{where}:row {row}", _Named(record, classes) if classes else record


class _Named(Mapping):
    """A record in which class indices are the names that the data set gives them."""

    def __init__(self, record: ArrowRow, classes: dict):
        self.record, self.classes = record, classes

    def __getitem__(self, name: str) -> object:
        value: Any = self.record[name]
        feature = self.classes.get(name)
        if feature is None:
            return value
        return [_class_name(feature, v) for v in value] if isinstance(value, list) else _class_name(feature, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.record)

    def __len__(self) -> int:
        return len(self.record)


def _class_name(feature, index: int | None) -> str | None:
    """None for a missing label, which ``datasets`` writes as None or -1."""
    return None if index is None or index < 0 else feature.int2str(index)
