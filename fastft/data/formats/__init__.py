"""Readers of data files: each yields ``(where, record)``, where naming the file and line so that errors can.

A new format is one file of this folder that registers a ``read(path, source)``; nothing names it.
"""

import importlib
import pkgutil
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastft.config import Source
from fastft.data.formats import hf
from fastft.data.formats.base import FORMATS, Record, format_of
from fastft.data.sources import walk
from fastft.errors import UserError, did_you_mean

# A file registers itself, under its name and suffixes, when it is imported.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def files_of(source: Source) -> list[Path]:
    """The files of a source in a fixed order: itself, or the files with a known format in the folder, by name.

    Raises
    ------
    UserError
        The path does not exist, the folder holds no file of a known format, or the hub's data set cannot be had.
    """
    if source.dataset:
        return hf.hub_files(source)
    path = Path(source.path)
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.iterdir())[:20] if path.parent.is_dir() else []
        near = [f"Did you mean {path.parent / name}? " for name in get_close_matches(path.name, siblings, n=1)]
        hint = (
            f"{''.join(near)}In {path.parent} there are: {', '.join(siblings)}."
            if siblings
            else f"The folder {path.parent} does not exist either."
        )
        raise UserError(f"{path}: no such file or folder.", hint)
    if path.is_file():
        if source.split is not None:
            raise UserError(
                f"{path}: split: {source.split} names a part of a folder, and this is one file.",
                "Remove split, or give the folder.",
            )
        return [path]
    if hf.is_saved_dataset(path):
        return [path]
    if not path.is_dir():
        raise UserError(
            f"{path}: is a pipe or a device, not a regular file: it is read more than once.", "Write it to a file."
        )
    files, _ = _in_folder(source)
    if source.split is not None:
        files = _of_split(path, files, source.split)
    if nothing := [p for p in files if not p.is_file()]:
        raise UserError(f"{nothing[0]}: is a link to nothing.", "Fix or remove it.")
    if not files:
        raise UserError(
            f"{path}: the folder holds no file of a known format.",
            f"Known: {', '.join(FORMATS.names())} (also .gz, .zst).",
        )
    return files


def not_read(source: Source) -> list[Path]:
    """Files of a folder that could be read by their names, but are none of its data."""
    path = Path(source.path)
    return _in_folder(source)[1] if source.path and path.is_dir() and not hf.is_saved_dataset(path) else []


# Of a clone, an archive or a hub's data set: text about the data, and descriptions that tools keep beside it.
NO_DATA = re.compile(
    r"(readme|license|licence|notice|changelog|contributing|citation|authors|datasheet)(\..*)?"
    r"|(dataset_infos?|dataset_dict|state|package|package-lock|tsconfig|config|metadata)\.json|requirements.*\.txt",
    re.IGNORECASE,
)
NO_DATA_FOLDERS = ("__MACOSX", "__pycache__", "node_modules")


def _in_folder(source: Source) -> tuple[list[Path], list[Path]]:
    """Files of known formats: those that are data, and those that are not. Hidden ones are neither."""
    folder = Path(source.path)
    data, others = list[Path](), list[Path]()
    for file in walk(folder):
        parts = file.relative_to(folder).parts
        if format_of(file) is None or any(part.startswith(".") or part in NO_DATA_FOLDERS for part in parts):
            continue
        (others if NO_DATA.fullmatch(file.name) else data).append(file)
    return data, others


# As hubs name them: train-00000-of-00002.parquet, data/test.jsonl, validation/part.csv.
SPLIT_NAMES = (
    {"train", "training"},
    {"validation", "valid", "val", "dev", "development"},
    {"test", "testing", "eval", "evaluation"},
)


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Those whose name, or a folder's on the way, begins with the split's name as a word of its own."""
    names = next((group for group in SPLIT_NAMES if split.lower() in group), {split.lower()})

    def words(file: Path) -> set[str]:
        return {re.split(r"[-_. ]", part.lower())[0] for part in file.relative_to(folder).parts}

    found = [file for file in files if words(file) & names]
    if not found:
        known = sorted({word for file in files for word in words(file)})[:10]
        raise UserError(
            f"{folder}: no file of a split {split!r} among {len(files)}.",
            f"A split's files begin with its name (test-00000.parquet), or lie in a folder of it. Here: "
            f"{', '.join(known)}.",
        )
    return found


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """All records of a source: ``(where, record)`` with where = ``file:line`` (or row) for messages.

    Raises
    ------
    UserError
        Unknown format, unreadable file, broken line (file and line number), a column to rename that is not there.
    """
    for where, record in _read(source):
        yield where, _Renamed(where, record, source.columns) if source.columns else record


class _Renamed(Mapping):
    """A record, some of whose columns have other names."""

    def __init__(self, where: str, record: Record, columns: dict[str, str]):
        self.record, self.columns = record, columns
        for new, old in columns.items():
            if old not in record:
                raise UserError(
                    f"{where}: no column {old!r}, which columns.{new} names.", did_you_mean(old, list(record))
                )

    def __getitem__(self, name: str) -> object:
        if name not in self:
            raise KeyError(name)
        return self.record[self.columns.get(name, name)]

    def __contains__(self, name: object) -> bool:
        return name in self.columns or (name in self.record and name not in self.columns.values())

    def __iter__(self) -> Iterator[str]:
        yield from self.columns
        yield from (name for name in self.record if name not in self.columns and name not in self.columns.values())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _read(source: Source) -> Iterator[tuple[str, Record]]:
    if source.dataset:
        yield from hf.read_hub(source)
        return
    for path in files_of(source):
        yield from read_file(path, source)


def read_file(path: Any, source: Source) -> Iterator[tuple[str, Record]]:
    """The records of one file (a Path, or what opens itself: see ``open_text``). Raises as ``read`` does."""
    name = source.format if source.format != "auto" else ("hf" if path.is_dir() else format_of(path))
    if name is None:
        raise UserError(
            f"{path}: cannot tell the format from the name.", f"Set format to one of: {', '.join(FORMATS.names())}."
        )
    with readable(path, name):
        yield from FORMATS.get(name)(path, source)


@contextmanager
def readable(path: Any, name: str) -> Iterator[None]:
    """What reading a file raises, as a UserError: truncated gzip, not UTF-8, no permission."""
    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read as {name}: {e}", "Files must be UTF-8 text, or gzip of it.") from None
