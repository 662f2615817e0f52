"""Data sets saved by Hugging Face ``datasets`` (``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``)."""

from pathlib import Path

from fastft.data.formats.base import FORMATS
from fastft.errors import UserError, did_you_mean


def is_saved_dataset(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


@FORMATS.register("hf")
def read(path, source):
    import datasets

    if not is_saved_dataset(path):
        raise UserError(f"{path}: not a data set saved by Dataset.save_to_disk.", "It must hold dataset_info.json or dataset_dict.json.")
    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if source.split is None:
            raise UserError(f"{path}: holds several splits ({', '.join(data)}).", "Name one: {path: ..., split: train}.")
        if source.split not in data:
            raise UserError(f"{path}: no split {source.split!r}.", did_you_mean(source.split, data))
        data = data[source.split]
    names = {name: feature for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)}
    for row, record in enumerate(data):
        for name, feature in names.items():  # class indices become the names that the data set gives them
            if record[name] is not None and record[name] >= 0:
                record[name] = feature.int2str(record[name])
        yield f"{path}:row {row + 1}", record
