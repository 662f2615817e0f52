"""Readers of data files: each yields ``(where, record)``, where naming the file and line so that errors can.

A new format is one file of this folder that registers a ``read(path, source)``; nothing names it.
"""

import importlib
import pkgutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastft.config import Source
from fastft.data.formats import hf
from fastft.data.formats.base import FORMATS, Record, format_of
from fastft.data.sources import walk
from fastft.errors import UserError

# A file registers itself, under its name and suffixes, when it is imported.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def files_of(source: Source) -> list[Path]:
    """The files of a source in a fixed order: itself, or the files with a known format in the folder, by name.

    Raises
    ------
    UserError
        The path does not exist, or the folder holds no file of a known format.
    """
    path = Path(source.path)
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.iterdir())[:20] if path.parent.is_dir() else []
        hint = (
            f"In {path.parent} there are: {', '.join(siblings)}."
            if siblings
            else f"The folder {path.parent} does not exist either."
        )
        raise UserError(f"{path}: no such file or folder.", hint)
    if path.is_file() or hf.is_saved_dataset(path):
        return [path]
    files = [p for p in walk(path) if format_of(p) is not None]
    if nothing := [p for p in files if not p.is_file()]:
        raise UserError(f"{nothing[0]}: is a link to nothing.", "Fix or remove it.")
    if not files:
        raise UserError(
            f"{path}: the folder holds no file of a known format.", f"Known: {', '.join(FORMATS.names())} (also .gz)."
        )
    return files


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """All records of a source: ``(where, record)`` with where = ``file:line`` (or row) for messages.

    Raises
    ------
    UserError
        Unknown format, unreadable file, broken line (file and line number).
    """
    for path in files_of(source):
        name = source.format if source.format != "auto" else ("hf" if path.is_dir() else format_of(path))
        if name is None:
            raise UserError(
                f"{path}: cannot tell the format from the name.", f"Set format to one of: {', '.join(FORMATS.names())}."
            )
        try:
            yield from FORMATS.get(name)(path, source)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:  # truncated gzip, not UTF-8, no permission
            raise UserError(
                f"{path}: cannot be read as {name}: {e}", "Files must be UTF-8 text, or gzip of it."
            ) from None
