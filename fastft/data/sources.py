"""The files that data comes from: which they are, and what is in them."""

import time
from collections.abc import Iterator
from pathlib import Path

from fastft.errors import UserError
from fastft.files import in_threads, sha256_file

SETTLED = 1.0  # seconds that a file must have been left alone before its times identify its content


def folders(folder: Path) -> Iterator[Path]:
    """A folder and all under it, through links, each once: by its path without links where it has one."""
    seen: set[tuple[int, int]] = set()  # device, inode
    real, links = [folder], list[Path]()
    while real or links:
        here = real.pop() if real else links.pop(0)
        stat = here.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        yield here
        for path in sorted(here.iterdir()):
            if path.is_dir():
                (links if path.is_symlink() else real).append(path)


def walk(folder: Path) -> list[Path]:
    """All files in ``folders``, sorted.

    Links to nothing are among them, for whoever reads them to refuse, but for hidden ones (editors' locks).
    """
    paths = (path for here in folders(folder) for path in here.iterdir())
    return sorted(
        path
        for path in paths
        if path.is_file() or (not path.exists() and path.is_symlink() and not path.name.startswith("."))
    )


def holds(folder: Path, path: Path) -> bool:
    """Whether a path, which need not be there yet, lies in a folder, or in one that it links to."""
    above = (path.resolve(), *path.resolve().parents)
    return any(here.resolve() in above for here in folders(folder))


def files_in(sources: list[str]) -> list[Path]:
    """The sources in their order, each folder as the files in it; what is given twice is listed twice."""
    found = []
    for source in (Path(s).absolute() for s in sources):
        found += walk(source) if source.is_dir() else [source]
    return found


def fingerprint(files: list[Path], known: dict[str, dict]) -> dict[str, dict]:
    """SHA-256 of every file, by path.

    Reading a terabyte again at every resume would take longer than losing the steps: a file that is in ``known`` as the
    same inode with its size and times of modification and of the inode's change is not read. This is kept only of files
    that had been left alone for SETTLED before they were read to the end. What is written through a memory map may keep
    a file's times until it reaches the disk.

    Returns
    -------
    dict
        Per file ``sha256``, and ``stat`` (bytes, mtime_ns, ctime_ns, inode, device) where it may be relied on.
    """

    def read(file: Path) -> dict:
        before, entry = _stat(file), known.get(str(file), {})
        if entry.get("stat") != before:
            entry = {"sha256": sha256_file(file)}
            if _stat(file) == before and time.time() - max(before[1:3]) / 1e9 > SETTLED:
                entry["stat"] = before
        return entry

    return dict(zip(map(str, files), in_threads(read, files), strict=True))


def unchanged(sources: list[str], found: dict[str, dict]) -> dict[str, dict]:
    """``fingerprint`` once more, after the sources were read.

    UserError when they are not as ``found``: what was read may be a part of each version.
    """
    advice = "Run again when nothing writes to it any more."
    now = files_in(sources)
    if other := {str(file) for file in now} ^ set(found):
        raise UserError(f"{min(other)}: came or went while the data was read.", advice)
    again = fingerprint(now, found)
    for file, entry in again.items():
        if entry["sha256"] != found[file]["sha256"]:
            raise UserError(f"{file}: changed while it was read.", advice)
    return again


def _stat(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
