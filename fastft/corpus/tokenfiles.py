"""Files of tokens that others write: datatrove's `.ds` (with `.ds.index`, `.ds.metadata`) and Megatron-LM's `.bin` with
`.idx`. What is cut short or garbled is refused by name before a token is taken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastft.errors import UserError

MAGIC, LEGACY, HEADER = b"MMIDIDX\x00\x00", b"TNTIDX", 34
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's numbers of dtypes; 6 and 7 are floats
COPY = "Copy the files anew, or write them again."


@dataclass(frozen=True)
class TokenFile:
    """Attributes
    ----------
    path : Path
        Of the tokens.
    paths : tuple of Path
        All files that belong to it.
    kind : str
        "datatrove" or "megatron".
    dtype : str
    ends : (documents,) int64
        Where each document ends, in tokens.
    tokenizer : str or None
        What the file says of it.
    """

    path: Path
    paths: tuple[Path, ...]
    kind: str
    dtype: str
    ends: np.ndarray
    tokenizer: str | None

    def pieces(self, most: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The number of the first document, tokens (int64), and lengths of documents that have ``most`` tokens
        together, or of one that is longer.
        """
        if not len(self.ends) or not self.ends[-1]:
            return
        values = np.memmap(self.path, self.dtype, mode="r")
        first, start = 0, 0
        while first < len(self.ends):
            last = max(first + 1, int(np.searchsorted(self.ends, start + most, side="right")))
            stop = int(self.ends[last - 1])
            yield first, values[start:stop].astype(np.int64), np.diff(self.ends[first:last], prepend=start)
            first, start = last, stop


def opened(paths: list[str]) -> list[TokenFile]:
    """The token files of paths and of folders, in a fixed order, each once. UserError where there is none, and for one
    that is not whole.
    """
    found: dict[Path, Path] = {}  # by what it is, whatever way it was named
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in (".ds", ".bin"))
            if not inside:
                raise UserError(f"{path}: holds no .ds or .bin file.")
            for file in inside:
                found.setdefault(file.resolve(), file)
        elif not path.is_file():
            raise UserError(f"{path}: is not there.")
        elif path.suffix in (".ds", ".bin", ".idx"):
            file = path.with_suffix(".bin") if path.suffix == ".idx" else path
            found.setdefault(file.resolve(), file)
        else:
            raise UserError(f"{path}: is no file of tokens.", "Known are .ds (datatrove), .bin and .idx (Megatron-LM).")
    return [datatrove(path) if path.suffix == ".ds" else megatron(path) for path in found.values()]


def datatrove(path: Path) -> TokenFile:
    """A file of datatrove's DocumentTokenizer: tokens of 2 or 4 bytes, ``.index`` (ends of documents, uint64) and,
    where there is one, ``.metadata`` (tokenizer|bytes of a token, number of tokens). UserError where it is not whole.
    """
    index, metadata, loss = (path.with_name(path.name + end) for end in (".index", ".metadata", ".loss"))
    ends = _ends(index, _content(index, f"{path}: has no index ({index.name}), which says where documents end."))
    total, size = int(ends[-1]) if len(ends) else 0, path.stat().st_size
    tokenizer, paths = None, [path, index]
    if metadata.is_file():
        paths.append(metadata)
        lines = metadata.read_text(encoding="utf-8", errors="replace").splitlines()
        name, _, width = lines[0].rpartition("|") if lines else ("", "", "")
        if len(lines) < 2 or width not in ("2", "4") or not lines[1].strip().isdigit():
            raise UserError(
                f"{metadata}: is not datatrove's: tokenizer|bytes of a token, and the number of tokens.", COPY
            )
        each, counted = int(width), int(lines[1])
        tokenizer = None if name.startswith("Unknown Tokenizer") else name
        if counted != total:
            raise UserError(f"{metadata}: says {counted:,} tokens, {index.name} {total:,}.", COPY)
    else:
        each = size // total if total else 2
    if each not in (2, 4) or size != total * each:
        raise _cut_short(path, size, total)
    if loss.is_file():
        paths.append(loss)
        learned = np.frombuffer(loss.read_bytes(), np.uint8)
        if len(learned) != total or not learned.all():
            raise UserError(
                f"{loss}: leaves tokens out of the loss, which a corpus cannot.", "Without it all are learned."
            )
    return TokenFile(path, tuple(paths), "datatrove", "<u2" if each == 2 else "<u4", ends, tokenizer)


def _cut_short(path: Path, size: int, total: int) -> UserError:
    return UserError(
        f"{path}: is cut short or garbled: {size:,} bytes are not the {total:,} tokens of its index.", COPY
    )


def _content(path: Path, missing: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(missing, "Copy it beside the tokens.") from None


def _ends(path: Path, content: bytes) -> np.ndarray:
    if len(content) % 8:
        raise UserError(f"{path}: is cut short: {len(content):,} bytes are no whole number of documents.", COPY)
    ends = np.frombuffer(content, "<u8").astype(np.int64)
    wrong = np.flatnonzero(np.diff(ends, prepend=0) < 0)
    if len(wrong):
        raise UserError(f"{path}: is garbled: document {wrong[0] + 1} ends before the one in front of it.", COPY)
    return ends


def megatron(path: Path) -> TokenFile:
    """A ``.bin`` file of Megatron-LM with the ``.idx`` beside it (MMIDIDX, version 1, with or without the modes that
    multimodal data has). Sequences of a document follow each other. UserError for one that is not whole.
    """
    index = path.with_suffix(".idx")
    if not path.is_file():
        raise UserError(f"{index}: has no tokens beside it ({path.name}).", "Copy them there.")
    content = _content(index, f"{path}: has no index ({index.name}), which says where documents end.")
    if content.startswith(LEGACY):
        raise UserError(
            f"{index}: is of the older kind (TNTIDX, lazy or cached).", "Write it again with Megatron's mmap."
        )
    if not content.startswith(MAGIC) or len(content) < HEADER:
        raise UserError(f"{index}: is no index of Megatron-LM (MMIDIDX), or is cut short.", COPY)
    version, code, count, documents = struct.unpack("<QBQQ", content[len(MAGIC) : HEADER])
    if version != 1 or code not in CODES:
        what = f"version {version}" if version != 1 else f"dtype {code}, which is no integer"
        raise UserError(f"{index}: {what}: only version 1 with integer tokens is known.")
    whole = HEADER + 12 * count + 8 * documents
    if len(content) not in (whole, whole + count):
        raise UserError(
            f"{index}: is cut short or garbled: {len(content):,} bytes, {count:,} sequences and {documents:,} marks of "
            f"documents take {whole:,}.",
            COPY,
        )
    sizes = np.frombuffer(content, "<i4", count, HEADER).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", count, HEADER + 4 * count)
    marks = np.frombuffer(content, "<i8", documents, HEADER + 12 * count)
    dtype = np.dtype(CODES[code])
    sums = np.concatenate([[0], np.cumsum(sizes)])
    wrong = np.flatnonzero((sizes < 0) | (pointers != sums[:-1] * dtype.itemsize))
    if len(wrong):
        raise UserError(f"{index}: is garbled: sequence {wrong[0] + 1} does not follow the one in front of it.", COPY)
    if not documents or marks[0] != 0 or marks[-1] != count or (np.diff(marks) < 0).any():
        raise UserError(f"{index}: is garbled: its documents do not follow each other.", COPY)
    if any(content[whole:]):
        raise UserError(f"{index}: holds sequences that are no text (multimodal).", "Import text alone.")
    size = path.stat().st_size
    if size != sums[-1] * dtype.itemsize:
        raise _cut_short(path, size, int(sums[-1]))
    return TokenFile(path, (path, index), "megatron", dtype.str, sums[marks[1:]], None)
