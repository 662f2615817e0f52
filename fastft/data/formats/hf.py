"""Data sets saved by Hugging Face ``datasets`` (``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``)."""

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
    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if source.split is None:
            raise UserError(
                f"{path}: holds several splits ({', '.join(data)}).", "Name one: {path: ..., split: train}."
            )
        if source.split not in data:
            raise UserError(f"{path}: no split {source.split!r}.", did_you_mean(source.split, data))
        data = data[source.split]
    classes = {}  # column -> its ClassLabel; also where every row holds a list of them
    for name, feature in data.features.items():
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
        if isinstance(inner, datasets.ClassLabel):
            classes[name] = inner
    row = 0
    for batch in data.with_format("arrow").iter(BATCH):
        for record in rows_of_batch(batch):
            row += 1
            yield f"{path}:row {row}", _Named(record, classes) if classes else record


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
