"""Writing files and folders so that a path holds the old content or the whole new one, never a part."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` for a file or folder to be made, which takes its place when the block ends.

    The name is hidden and fastft's own: what a killed process left under it is removed, and no file of the user has it. When the block
    raises, what it made is removed and ``path`` stays as it was.
    """
    scratch, aside = (path.with_name(f".{path.name}.fastft-{part}") for part in ("new", "old"))
    remove(scratch)
    try:
        yield scratch
        if path.is_dir():  # only a file is replaced in one step
            remove(aside)
            path.rename(aside)
        scratch.replace(path)
    except BaseException:
        remove(scratch)
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
