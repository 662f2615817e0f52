"""The files of a corpus's sources, here or behind a URL: which they are, what is in them, and how they are opened."""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, TextIO, cast

import numpy as np

from fastft.config.corpus import Files
from fastft.data import formats
from fastft.data.formats.base import DATA_EXTRA, FORMATS, decompressed, format_of
from fastft.data.sources import fingerprint
from fastft.errors import UserError

LINE = 8  # how many times the longest document a line may be
WHOLE = 64  # how many times the longest document a file may be that is read at once
CHUNK = 1 << 20
BINARY = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16, which is full of zeros, too
STATE = ("size", "ETag", "etag", "md5Hash", "created", "mtime")  # what file systems call what changes with a file
MODULES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class DataFile:
    """A file that opens itself, for the readers of ``fastft.data.formats``, and holds no more of it than it must.

    Attributes
    ----------
    most_text : int
        Bytes of the longest document, in UTF-8.
    most : int
        Bytes of the longest file that is read at once.
    most_line : int
        Bytes of the longest line: a document's may be escaped in it, beside other columns.
    rows : int
        Rows of a Parquet file that are decoded at a time.
    too_long : list of int
        Lines that were longer than a document may be, and were passed over.
    """

    rows = 256

    def __init__(self, where: str, source: Files, longest: int):
        self.where, self.source = where, source
        self.path: PurePath = PurePosixPath(where.partition("://")[2]) if "://" in where else Path(where)
        self.most_text, self.most, self.most_line = longest, longest * WHOLE, longest * LINE
        self.too_long: list[int] = []
        self.raw: BinaryIO | None = None
        self.content: BinaryIO | None = None  # decompressed

    def __str__(self) -> str:
        return self.where

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def suffixes(self) -> list[str]:
        return self.path.suffixes

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def format(self) -> str | None:
        return self.source.format if self.source.format != "auto" else format_of(self.path)

    def is_dir(self) -> bool:
        return False

    def open_raw(self) -> BinaryIO:
        """As it lies there, compressed or not. UserError where it is behind a URL and cannot be had."""
        self.raw = _opened(self.where)
        return self.raw

    @property
    def as_it_lies(self) -> bool:
        """Whether its bytes are what lies there, on this machine, as long as no line was passed over."""
        return "://" not in self.where and self.content is self.raw

    @property
    def utf8(self) -> bool:
        """Whether it is told to be."""
        return codecs.lookup(self.source.encoding).name == "utf-8"

    def open_text(self, newline: str | None = None) -> TextIO:
        """Text in the source's encoding. UserError for a binary file."""
        encoding = "utf-8-sig" if self.utf8 else self.source.encoding
        text = io.TextIOWrapper(self.open_bytes(), encoding=encoding, newline=newline)
        text._CHUNK_SIZE = 1 << 18  # type: ignore[attr-defined]  # 8 KiB is its own
        return text

    def open_bytes(self) -> Any:
        """The bytes of a text, without lines that are too long. UserError for a binary file."""
        content = self.content = decompressed(self.open_raw(), self.where)
        buffered = io.BufferedReader(cast(io.RawIOBase, content), CHUNK)
        start = buffered.peek(1 << 13)[: 1 << 13]
        encoding = self.source.encoding.lower().replace("_", "-")
        wide = "16" in encoding or "32" in encoding
        if not wide and (b"\0" in start or start[:2] in BINARY):
            kind = "is UTF-16" if start[:2] in BINARY else "holds zero bytes: it is binary"
            raise UserError(
                f"{self.where}: {kind}, not {self.source.encoding} text.",
                "Set encoding in the source, or leave it out.",
            )
        if self.format == "jsonl" and not wide:
            buffered = io.BufferedReader(_Lines(buffered, self.most_line, self.too_long), CHUNK)
        elif self.format in ("csv", "tsv") and not wide:  # a line may be a part of a row
            buffered = io.BufferedReader(_Lines(buffered, self.most_line, _Refused(self.where)), CHUNK)
        return buffered

    def size(self) -> int:
        """Bytes as it lies there."""
        if "://" in self.where:
            with reached(self.where, "looked at"):
                fs, path = filesystem(self.where)
                return int(fs.size(path))
        return Path(self.where).stat().st_size

    def state(self) -> str:
        """What is other once it was written anew; of a file behind a URL, where its file system says such things."""
        if "://" not in self.where:
            stat = Path(self.where).stat()
            return repr([stat.st_size, stat.st_mtime_ns, stat.st_ino])
        with reached(self.where, "looked at"):
            fs, path = filesystem(self.where)
            fs.invalidate_cache()
            found = fs.info(path)
            return repr([str(found.get(name)) for name in STATE])

    def position(self) -> int:
        """Bytes of it that were read."""
        try:
            return self.raw.tell() if self.raw is not None else 0
        except ValueError:  # closed: it was read to its end
            return self.size()


def _opened(where: str) -> BinaryIO:
    if "://" not in where:
        return open(where, "rb")
    with reached(where, "opened"):
        fs, path = filesystem(where)
        return cast(BinaryIO, io.BufferedReader(_Remote(fs.open(path, "rb"), where), CHUNK))


class _Remote(io.RawIOBase):
    """A file behind a URL, whose faults are UserErrors."""

    def __init__(self, content: Any, where: str):
        self.content, self.where = content, where

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with reached(self.where, "read"):
            part = self.content.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.content.seek(offset, whence))

    def tell(self) -> int:
        return int(self.content.tell())

    def close(self) -> None:
        self.content.close()
        super().close()


class _Refused(list[int]):
    """Where no line may be passed over."""

    def __init__(self, where: str):
        super().__init__()
        self.where = where

    def append(self, line: int) -> None:
        raise UserError(
            f"{self.where}:{line}: a line is longer than {LINE} times max_document_bytes, and may be a part of a row.",
            "Raise max_document_bytes, or write the file as jsonl, of which such rows are left out.",
        )


def occurrences(content: bytes, byte: bytes) -> int:
    """As ``content.count``, several times as fast."""
    return int(np.count_nonzero(np.frombuffer(content, np.uint8) == byte[0]))


class _Lines(io.RawIOBase):
    """A file of lines in which those that are too long are empty."""

    def __init__(self, content: Any, most: int, too_long: list[int]):
        self.content, self.most, self.too_long = content, most, too_long
        self.ready = memoryview(b"")
        self.held: list[bytes] = []  # of the line that has not ended yet
        self.size, self.number, self.passing = 0, 1, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.ready:
            self.ready = memoryview(self.read1())
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def read1(self, size: int = -1) -> bytes:
        """What comes next, whole lines but at the end; nothing there. Not mixed with ``readinto``."""
        while chunk := self.content.read1(CHUNK):
            if ready := self._take(chunk):
                return ready
        rest, self.held = b"".join(self.held), []
        return rest

    def _take(self, chunk: bytes) -> bytes:
        """The lines that end in it."""
        end = chunk.rfind(b"\n") + 1
        if not end:
            self._hold(chunk)
            return b""
        first = chunk.find(b"\n") + 1
        self._hold(chunk[:first])
        whole = b"\n" if self.passing else b"".join(self.held)
        self.held, self.size, self.passing = [], 0, False
        rest = chunk[first:end]
        self.number += 1
        if self.most < len(rest):  # no line of it can be longer than it is
            lines = rest.split(b"\n")
            for i, line in enumerate(lines):
                if len(line) > self.most:
                    self.too_long.append(self.number + i)
                    lines[i] = b""
            rest = b"\n".join(lines)
        self.number += occurrences(rest, b"\n")
        self._hold(chunk[end:])
        return whole + rest

    def _hold(self, part: bytes) -> None:
        if not self.passing and part:
            self.held.append(part)
            self.size += len(part)
            if self.size > self.most:
                self.too_long.append(self.number)
                self.held, self.passing = [], True

    def close(self) -> None:
        self.content.close()
        super().close()


@contextmanager
def reached(url: str, what: str) -> Iterator[None]:
    """UserError for whatever a file system's library raises: they have errors of their own (botocore's, Azure's)."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as e:
        raise UserError(f"{url}: is not there: {e}.", "Check the bucket, the folder and the name.") from None
    except Exception as e:
        raise UserError(f"{url}: cannot be {what}: {e}.", "Check the URL, its credentials and the network.") from None


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. UserError where it cannot be had."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as e:
        extra = f"pip install {MODULES[scheme]}" if scheme in MODULES else DATA_EXTRA
        raise UserError(f"{url}: {e}.", extra) from None
    except ValueError as e:
        raise UserError(f"{url}: {e}.", "Use a URL such as s3://bucket/folder, or a path.") from None


def files_of(source: Files, longest: int) -> list[DataFile]:
    """The files of a source, in a fixed order. UserError where there are none, or one has no known format.

    ``longest``: bytes of a document, in UTF-8.
    """
    names = _remote(source.path) if source.remote else _local(source)
    files = [DataFile(name, source, longest) for name in names]
    for file in files:
        if file.format is None:
            raise UserError(
                f"{file}: cannot tell the format from the name.", f"Set format to one of: {', '.join(FORMATS.names())}."
            )
        if file.format == "hf":
            raise UserError(f"{file}: a saved data set is not read.", "Give its Parquet files.")
        FORMATS.get(file.format)
    return files


def _local(source: Files) -> list[str]:
    """Files of a path, or of all that a pattern matches, each once; none of a corpus that lies there, too."""
    if not glob.has_magic(source.path) or Path(source.path).exists():
        listed = formats.files_of(source)
        kept = [path for path in listed if len(listed) == 1 or not _of_corpus(path)]
        if not kept:
            raise UserError(f"{source.path}: holds nothing but corpora.", "A corpus is trained on as it is.")
        return [str(path) for path in kept]
    names = (name for name in glob.glob(source.path, recursive=True) if Path(name).is_file())
    found = sorted(name for name in names if not _of_corpus(Path(name)))
    if not found:
        raise UserError(f"{source.path}: no file matches.", "In it, * is any text, ? a character, ** folders.")
    known = [name for name in found if source.format != "auto" or format_of(Path(name)) is not None]
    return known or found


def _of_corpus(path: Path) -> bool:
    """Whether a file is a corpus's own."""
    return path.name in ("manifest.json", "progress.json") and (path.parent / "shards").is_dir()


def _remote(url: str) -> list[str]:
    scheme = url.partition("://")[0]
    fs, path = filesystem(url)
    pattern = any(sign in path for sign in "*?[")
    with reached(url, "listed"):
        if pattern:
            found = [name for name in fs.glob(path) if fs.isfile(name)]
        elif fs.isfile(path):
            found = [path]
        else:
            found = [name for name in fs.find(path) if format_of(PurePosixPath(name)) is not None]
        if not found:
            fs.invalidate_cache()
            fs.ls(
                re.split(r"[*?[]", path)[0].rpartition("/")[0] if pattern else path
            )  # where there is none, it says so
    if not found:
        raise UserError(f"{url}: no file of a known format.", f"Known: {', '.join(FORMATS.names())} (also .gz, .zst).")
    return [f"{scheme}://{name.removeprefix(f'{scheme}://')}" for name in sorted(found)]


def hashes(files: list[DataFile], known: dict[str, dict]) -> dict[str, dict]:
    """``sha256`` of every file, by its name; those in ``known`` that lie there unchanged are not read again."""
    found = fingerprint([Path(file.where) for file in files if "://" not in file.where], known)
    for file in files:
        if "://" in file.where:
            sha = hashlib.sha256()
            with _opened(file.where) as f:
                while chunk := f.read(CHUNK):
                    sha.update(chunk)
            found[file.where] = {"sha256": sha.hexdigest()}
    return found


def changed(files: list[DataFile], states: list[str], known: dict[str, dict]) -> str | None:
    """The first file that is another than it was before it was read (``states``), or when it was hashed; those behind a
    URL are not read again for it.
    """
    found = hashes([file for file in files if "://" not in file.where], known)
    names = [name for name, entry in found.items() if entry["sha256"] != known[name]["sha256"]]
    names += [file.where for file, state in zip(files, states, strict=True) if file.state() != state]
    return names[0] if names else None
