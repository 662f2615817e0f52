"""Shards of tokens on disk.

A corpus is a folder with ``manifest.json``, written last, and ``shards/<number>``: ``tokens.values.bin`` and
``tokens.offsets.npy`` (a document per row), ``places.npy`` ((documents, 2) int64: file of the source and row in it),
``ids.npy`` ((documents, 16) uint8: a hash of the text) and ``characters.npy`` ((documents,) uint32: of each text). A
shard holds documents of one source.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastft.config import Source
from fastft.corpus.work import Done, place_name
from fastft.data.prepared import Ragged, RaggedWriter, map_ragged
from fastft.errors import UserError
from fastft.files import digest, fsync, remove, sha256_file, sha256_files

FORMAT = "fastft-corpus-1"
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # while it is made
REMOVING = ".removing"  # while documents are taken out of it
PROBED = 1 << 12  # bytes at either end of a file that are compared whenever it is opened
OF_FILES = ("format", "split", "columns", "element", "documents", "header", "delimiter", "quoting")  # options of files
AGAIN = "Prepare it again (fastft prepare --overwrite), or copy it anew."


@dataclass
class Shard:
    """What the manifest says of a shard.

    Attributes
    ----------
    source : int
    documents, tokens, characters : int
    files : dict
        Name -> ``bytes``, ``sha256`` and ``ends`` (of the file's two ends alone).
    """

    name: str
    source: int
    documents: int
    tokens: int
    characters: int
    files: dict[str, dict[str, Any]]


class ShardWriter:
    """Writes one shard, in a folder of its own that is renamed when it is complete."""

    def __init__(self, scratch: Path, folder: Path, source: int, dtype: str):
        remove(scratch)
        scratch.mkdir(parents=True)
        self.scratch, self.folder, self.source = scratch, folder, source
        self.ragged = RaggedWriter(scratch, "tokens", dtype)
        self.places: list[np.ndarray] = []
        self.ids: list[bytes] = []
        self.lengths: list[np.ndarray] = []
        self.documents = self.tokens = self.characters = 0
        self.rows = self.room = 0  # documents and tokens with those that are not kept

    def append(self, done: Done, kept: np.ndarray | None = None) -> None:
        """``kept``: (n,) bool: those that are written; the others take their room alone. Default: all."""
        self.rows += len(done.lengths)
        self.room += len(done.tokens)
        done = done if kept is None or kept.all() else done.only(kept)
        self.lengths.append(done.characters.astype("<u4"))
        self.ragged.extend(done.tokens, done.lengths)
        self.places.append(done.places)
        self.ids.append(b"".join(done.ids))
        self.documents += len(done.lengths)
        self.tokens += len(done.tokens)
        self.characters += int(done.characters.sum())

    def drop(self) -> None:
        """Nothing was kept."""
        self.ragged.close()
        remove(self.scratch)

    def close(self) -> Shard:
        self.ragged.close()
        np.save(self.scratch / "characters.npy", np.concatenate(self.lengths))
        np.save(self.scratch / "places.npy", np.concatenate(self.places))
        np.save(self.scratch / "ids.npy", np.frombuffer(b"".join(self.ids), np.uint8).reshape(-1, 16))
        files = {path.name: _described(path) for path in sorted(self.scratch.iterdir())}
        remove(self.folder)
        self.folder.parent.mkdir(exist_ok=True)
        self.scratch.rename(self.folder)
        fsync(self.folder.parent)
        return Shard(self.folder.name, self.source, self.documents, self.tokens, self.characters, files)


def _described(path: Path) -> dict[str, Any]:
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path), "ends": _ends(path)}


def _ends(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as f:
        ends = f.read(PROBED)
        f.seek(max(0, size - PROBED))
        ends += f.read(PROBED)
    return hashlib.sha256(ends).hexdigest()[:32]


def is_corpus(folder: Path) -> bool:
    """Whether a folder is, or was begun as, a corpus."""
    return (folder / MANIFEST).is_file() and _read(folder).get("format") == FORMAT


def begun(folder: Path) -> bool:
    """Whether a folder is a corpus that was not finished, or whose manifest is broken."""
    if (folder / REMOVING / MANIFEST).is_file():
        return True
    left = (folder / PROGRESS).is_file() or ((folder / MANIFEST).is_file() and (folder / "shards").is_dir())
    return left and not is_corpus(folder)


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def corpora_of(name: str, sources: list[Source]) -> list[Path]:
    """The folders of a set that is made of corpora; none where it is not. UserError for a mixture."""
    folders = [Path(source.path) for source in sources if source.path]
    for folder in filter(begun, folders):
        raise UserError(f"data set {name!r}: {folder} is a corpus that is not complete.", "Run fastft prepare again.")
    found = [folder for folder in folders if is_corpus(folder)]
    if found and len(found) < len(sources):
        raise UserError(
            f"data set {name!r}: {found[0]} is a prepared corpus, other sources are not.",
            "Prepare them all, into one corpus or several.",
        )
    for source in sources if found else ():
        given = [
            name
            for name in OF_FILES
            if getattr(source, name) != type(source).model_fields[name].get_default(call_default_factory=True)
        ]
        if given:
            raise UserError(
                f"data set {name!r}: {source.path} is a prepared corpus, of which {', '.join(given)} says nothing.",
                "Say it of the source that fastft prepare reads.",
            )
    return found


class Corpus:
    """A prepared corpus. Its shards are mapped when they are asked for.

    Raises UserError for a manifest that is not whole, and for a shard whose files have not the size that they had, or
    another beginning or end.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / REMOVING / MANIFEST).is_file():
            raise UserError(
                f"{folder}: a removal of documents was interrupted.",
                "Run the same fastft prepare again: it is finished.",
            )
        manifest = _read(folder)
        if manifest.get("format") != FORMAT or manifest.pop("digest", None) != digest(manifest):
            raise UserError(f"{folder / MANIFEST}: does not match its own digest, or is another version's.", AGAIN)
        self.manifest, self.digest = manifest, digest(manifest)
        self.shards = [Shard(**shard) for shard in manifest["shards"]]
        self.dtype = np.dtype(manifest["tokens"]["dtype"])
        for shard in self.shards:
            check_shard(folder / "shards" / shard.name, shard)

    def path(self, shard: int) -> Path:
        return self.folder / "shards" / self.shards[shard].name

    def tokens(self, shard: int) -> Ragged:
        """Documents of a shard."""
        folder = self.path(shard)
        return map_ragged(folder / "tokens.values.bin", folder / "tokens.offsets.npy", self.dtype)

    def ids(self, shard: int) -> np.ndarray:
        """(documents, 16) uint8, memory-mapped."""
        return np.load(self.path(shard) / "ids.npy", mmap_mode="r")

    def characters(self, shard: int) -> np.ndarray:
        """(documents,) uint32, memory-mapped."""
        return np.load(self.path(shard) / "characters.npy", mmap_mode="r")

    def places(self, shard: int) -> np.ndarray:
        """(documents, 2) int64, memory-mapped: number of the place's name in its source, and row (-1: a whole file)."""
        return np.load(self.path(shard) / "places.npy", mmap_mode="r")

    def where(self, shard: int, document: int) -> str:
        """Source, and file and row, as the file was called then."""
        place, row = self.places(shard)[document].tolist()
        source = self.manifest["sources"][self.shards[shard].source]
        return f"{source['name']}: {place_name(source['places'], place, row)}"

    def verify(self) -> None:
        """Re-hash every file. UserError names the first that differs."""
        said = {self.path(i) / name: e["sha256"] for i, s in enumerate(self.shards) for name, e in s.files.items()}
        for path, found in zip(said, sha256_files(said), strict=True):
            if found != said[path]:
                raise UserError(f"{path}: does not match its hash in {MANIFEST}.", AGAIN)


def check_shard(folder: Path, shard: Shard) -> None:
    """UserError for a shard that is not what the manifest says: sizes, and both ends of every file."""
    for name, entry in shard.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: is missing or cut short.", AGAIN)
        if _ends(path) != entry["ends"]:
            raise UserError(f"{path}: is not the file that was written (another shard's?).", AGAIN)


def as_json(shards: list[Shard]) -> list[dict[str, Any]]:
    return [asdict(shard) for shard in shards]
