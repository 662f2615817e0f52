"""Prepared data on disk: named numpy columns behind a manifest that hashes them and says what they were made from.

A folder holds ``<column>.npy`` (one value per row), or ``<column>.values.bin`` and ``<column>.offsets.npy`` (a sequence
per row), and ``MANIFEST.json``, written last: a folder without a valid one is not there. Columns are memory-mapped, so
that opening takes as long for 10^9 rows as for ten.
"""

import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastft.data.sources import files_in, fingerprint, unchanged
from fastft.errors import DISK, UserError
from fastft.files import digest, locked, replacing, sha256_file, sha256_files

FORMAT = 2
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # of file managers


class Ragged:
    """A sequence per row, over one flat memory-mapped array."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class RaggedWriter:
    """Appends sequences to a column without holding them in memory."""

    DEFAULT = np.dtype("<i4")  # token ids and piece indices

    def __init__(self, folder: Path, name: str, dtype: str = "<i4"):
        self.dtype = np.dtype(dtype)
        self.path = folder / f"{name}.values.bin"
        self.offsets_path = folder / f"{name}.offsets.npy"
        self.file = open(self.path, "wb")  # noqa: SIM115  # open until close(), for as long as rows come
        self.offsets = array("q", [0])

    def append(self, values: Iterable[int]) -> None:
        row = np.asarray(values, dtype=self.dtype)
        self.file.write(row.tobytes())
        self.offsets.append(self.offsets[-1] + len(row))

    def extend(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Many rows: their values one behind the other, and how many each has."""
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.offsets.frombytes((self.offsets[-1] + np.cumsum(lengths, dtype=np.int64)).tobytes())

    def close(self) -> Ragged:
        self.file.close()
        np.save(self.offsets_path, np.asarray(self.offsets))
        return map_ragged(self.path, self.offsets_path, self.dtype)


def split_where(where: str) -> tuple[str, int]:
    """What readers call a place, as a name and the number at its end; -1 where it has none."""
    found = re.fullmatch(r"(.*:(?:row )?)([0-9]+)", where, re.DOTALL)
    return (found[1], int(found[2])) if found else (where, -1)


class OriginsWriter:
    """Where every document was read: two columns (file, line or row), and the files' names for the meta."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, int] = {}
        self.rows = {"origin_file": array("q"), "origin_row": array("q")}

    def append(self, where: str) -> None:
        """``where`` as the readers give it: "file:12", "file:row 12", or the file alone (row -1)."""
        name, row = split_where(where)
        self.rows["origin_file"].append(self.files.setdefault(name, len(self.files)))
        self.rows["origin_row"].append(row)

    def close(self) -> list[str]:
        """Writes the columns; what ``origin`` needs of the meta as "origins"."""
        for name, column in self.rows.items():
            np.save(self.folder / f"{name}.npy", np.asarray(column))
        return list(self.files)


class Prepared:
    """Columns and meta of a prepared split.

    Attributes
    ----------
    columns : dict[str, np.ndarray | Ragged]
    meta : dict
        What the task recorded (labels, counts).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = _manifest(folder)
        assert manifest is not None, f"{folder}: not prepared"
        self.key, self.meta = manifest["key"], manifest["meta"]
        self.columns: dict[str, np.ndarray | Ragged] = {}
        for name in manifest["files"]:
            stem, _, kind = name.partition(".")
            if kind == "npy":
                self.columns[stem] = np.load(folder / name, mmap_mode="r")
            elif kind == "values.bin":
                dtype = np.dtype(self.meta.get("dtypes", {}).get(stem, RaggedWriter.DEFAULT))
                self.columns[stem] = map_ragged(folder / name, folder / f"{stem}.offsets.npy", dtype)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def verify(self) -> None:
        """Re-hash every file. UserError names the first that differs."""
        verify(self.folder)

    def origin(self, document: int) -> str:
        """Where a document was read: file and line, as the file was called then."""
        name, row = self.meta["origins"][int(self["origin_file"][document])], int(self["origin_row"][document])
        return f"{name}{row}" if row >= 0 else name


def prepare(folder: Path, settings: str, sources: list[str], build: Callable[[Path], dict]) -> Prepared:
    """Open the folder when it was made from these settings and sources and its files are whole; otherwise build it.

    ``build(folder)`` writes the columns and returns the meta. Ranks that ask at the same time wait for one of them: the
    build happens under a file lock, in a scratch folder that is renamed when it is complete.

    Parameters
    ----------
    settings : str
        Digest of everything beside the sources that the result depends on: tokenizer, settings, code version.
    sources : list of str
        Input files and folders. Their bytes decide; see ``fingerprint``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")) as writable:
        files = files_in(sources)
        manifest = _manifest(folder)
        recorded = (manifest or {}).get("sources", {})
        found = fingerprint(files, recorded)
        key = digest([settings, [found[str(file)]["sha256"] for file in files]])
        if (problem := check(folder, key)) is not None:
            if not writable:
                raise UserError(f"{folder}: cannot be used ({problem}), nor written.", "Choose another data.cache.")
            if strangers := _strangers(folder):
                raise UserError(
                    f"{folder}: is where prepared data goes, but holds other files: {', '.join(strangers[:5])}.",
                    "Choose another data.cache, or delete the folder if prepared data is all there was in it; "
                    "nothing was touched.",
                )
            with replacing(folder) as scratch:
                scratch.mkdir()
                make_room = "Make room, or set data.cache to a folder on another disk."
                with disk_told(scratch.parent, "prepared data", make_room):
                    meta = build(scratch)
                found = unchanged(sources, found)
                made = {
                    path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                    for path in sorted(scratch.iterdir())
                }
                write_manifest(
                    scratch,
                    {
                        "format": FORMAT,
                        "key": key,
                        "sources": found,
                        "made_because": problem,
                        "meta": meta,
                        "files": made,
                    },
                )
        elif manifest is not None and found != recorded:  # the same bytes under new times
            with suppress(OSError):  # a folder that may not be written is as good: its sources are read again next time
                write_manifest(folder, {**manifest, "sources": found})
        return Prepared(folder)


@contextmanager
def disk_told(folder: Path, what: str, hint: str) -> Iterator[None]:
    """UserError, naming the folder, when its disk does not take what is written."""
    try:
        yield
    except OSError as e:
        if e.filename is not None or e.errno not in (None, *DISK):  # None: NumPy's, which counts items
            raise
        left = f"{shutil.disk_usage(folder).free:,} bytes left"
        raise UserError(f"{folder}: no space left for {what}, or the disk fails ({left}): {e}.", hint) from None


def _manifest(folder: Path) -> dict | None:
    """The manifest of a prepared folder; None without one that matches its own digest and is in today's format."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    except (OSError, ValueError):
        return None
    whole = (
        isinstance(manifest, dict)
        and manifest.get("format") == FORMAT
        and manifest.pop("digest", None) == digest(manifest)
    )
    return manifest if whole else None


def _strangers(folder: Path) -> list[str]:
    """What in a folder is not known to be prepared data, in whatever state and of whatever version."""
    names = {file.name for file in folder.iterdir()} if folder.exists() else set()
    names = {name for name in names if name not in LITTER and not name.startswith((".MANIFEST.json.fastft-", ".nfs"))}
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    except (OSError, ValueError):
        return sorted(names)
    ours = (
        isinstance(manifest, dict) and isinstance(manifest.get("key"), str) and isinstance(manifest.get("files"), dict)
    )
    return sorted(names - {"MANIFEST.json", *manifest["files"]} if ours else names)


def check(folder: Path, key: str) -> str | None:
    """Why a prepared folder cannot be used for this key; None when it can.

    Sizes are checked here, hashes by ``verify``.
    """
    if not (folder / "MANIFEST.json").is_file():
        return "not there"
    if (manifest := _manifest(folder)) is None:
        return "manifest is broken, or another version's"
    if manifest["key"] != key:
        return "inputs, tokenizer or settings changed"
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            return f"{name} is missing or cut short"
    return None


def verify(folder: Path) -> None:
    """Re-hash every file against the manifest. UserError names the first that differs."""
    if (manifest := _manifest(folder)) is None:
        raise UserError(
            f"{folder / 'MANIFEST.json'}: does not match its own digest.",
            f"Delete {folder}; it will be prepared again.",
        )
    files = manifest["files"]
    for name, found in zip(files, sha256_files(folder / name for name in files), strict=True):
        if found != files[name]["sha256"]:
            raise UserError(
                f"{folder / name}: does not match its hash in MANIFEST.json.",
                f"Delete {folder}; it will be prepared again.",
            )


def map_ragged(values: Path, offsets: Path, dtype: np.dtype) -> Ragged:
    """A column of sequences on disk, memory-mapped."""
    empty = values.stat().st_size == 0  # an empty file cannot be mapped
    return Ragged(
        np.zeros(0, dtype) if empty else np.memmap(values, dtype=dtype, mode="r"), np.load(offsets, mmap_mode="r")
    )


def write_manifest(folder: Path, manifest: dict) -> None:
    with replacing(folder / "MANIFEST.json") as scratch, open(scratch, "w") as f:
        json.dump({**manifest, "digest": digest(manifest)}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
