"""Tensors in files that are mapped into memory: Linux writes them back where memory is short, and reads them again."""

from __future__ import annotations

import array
import bisect
import ctypes
import errno
import itertools
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastft.errors import UserError
from fastft.lazy import torch

PREFIX = ".fastft-state-"  # of a file's name
SMALL = 1 << 10  # elements: what has fewer stays in memory


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in such a file."""
    if tensor.device.type != "cpu":
        return False
    name = tensor.untyped_storage().filename
    return name is not None and Path(name).name.startswith(PREFIX)


def empty(folder: Path, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in a file of its own, which has no name any more: it goes with the process, however that ends.

    Raises
    ------
    UserError
        The folder cannot be written, or the disk has no room: taken now, for later the kernel would end the process.
    """
    numel = int(torch.Size(shape).numel())
    try:
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
    except OSError as e:
        raise UserError(f"{folder}: {e.strerror}.", "Choose another folder in parallel.offload_dir.") from None
    try:
        os.posix_fallocate(handle, 0, max(1, numel * dtype.itemsize))
        return torch.from_file(name, shared=True, size=numel, dtype=dtype).view(shape)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        size = numel * dtype.itemsize / 1e6
        raise UserError(
            f"{folder}: {e.strerror}: no room for {size:,.1f} MB of the run's state.",
            "Make room, or choose another folder in parallel.offload_dir.",
        ) from None
    finally:
        os.close(handle)
        os.unlink(name)


def moved(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """A copy in a file."""
    found = empty(folder, tensor.shape, tensor.dtype)
    found.copy_(tensor)
    return found


def beside(other: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, moved into a file where ``other`` lies in one."""
    if not is_mapped(other) or is_mapped(tensor) or tensor.numel() < SMALL:
        return tensor
    return moved(tensor, _folder(other))


def zeros_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros; in a file where the tensor lies in one."""
    if is_mapped(tensor) and tensor.numel() >= SMALL:
        return empty(_folder(tensor), tensor.shape, dtype)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)


def let_go(tensor: torch.Tensor) -> None:
    """Give back the memory of a tensor whose numbers are needed no more, where it lies in a file that is mapped:
    weights as safetensors opens them, of which one tensor keeps the mapping of all.

    What is on its pages alone, and was never written to: whoever reads it again finds it in the file.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.is_contiguous():
        _let_go(*_span(tensor))


def let_go_between(tensors: Iterable[torch.Tensor]) -> None:
    """The same for what else was read of the files that some of these tensors lie in: weights that were converted."""
    if sys.platform != "linux":
        return
    used = sorted(_span(t) for t in tensors if t.device.type == "cpu" and t.numel())
    for begin, end in _files_in_memory():
        own = used[bisect.bisect_left(used, (begin,)) : bisect.bisect_left(used, (end,))]
        if own:
            ends = list(itertools.accumulate((stop for _, stop in own), max, initial=begin))
            for stop, start in zip(ends, [*(start for start, _ in own), end], strict=True):
                _let_go(stop, start)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _files_in_memory() -> Iterator[tuple[int, int]]:
    """Addresses of files that are mapped, as they begin and end (proc(5): maps)."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, _, _, _, inode, *_ = line.split()
            if inode != "0":
                begin, end = span.split("-")
                yield int(begin, 16), int(end, 16)


def _let_go(begin: int, end: int) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = -(-begin // page), end // page
    if first < last and not _holds_own(first, last):
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page), MADV_DONTNEED)


MADV_DONTNEED = 4  # sys/mman.h


def _holds_own(first: int, last: int) -> bool:
    """Whether any of these pages, in memory or swapped out, is this process's own and in no file."""
    entries = array.array("Q")
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:  # 8 bytes a page (Linux, admin-guide/mm/pagemap)
            pages.seek(first * 8)
            entries.frombytes(pages.read((last - first) * 8))
    except (OSError, ValueError):
        return True
    there, of_file = 0b11 << 62, 1 << 61
    return len(entries) != last - first or any(entry & there and not entry & of_file for entry in entries)


def _folder(tensor: torch.Tensor) -> Path:
    name = tensor.untyped_storage().filename
    assert name is not None
    return Path(name).parent
