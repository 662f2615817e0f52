"""Files and folders on disk: a path holds the old content or the whole new one, never a part;
one writer at a time; digests.
"""

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
# flock's answers on a file system without locks: Lustre as often mounted, some of FUSE
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
TOUCHED = 5.0  # seconds between two touches of a held lock
ABANDONED = 60.0  # seconds without a touch after which nobody holds it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` for a file or folder to be made, which takes its place when the block ends.

    The name is hidden and fastft's own: what a killed process left under it is removed, and no file of the user has it.
    When the block raises, what it made is removed and ``path`` stays as it was.
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


@contextmanager
def locked(path: Path, keep: bool = True, on_wait: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Wait for a file's lock and hold it; yields False, holding nothing, where the path may not be written.

    ``keep``: leave the file where it is then, rather than remove it. ``on_wait``: called once where another holds it.

    Where the file system has no locks a hidden file beside the path serves as one: made by whoever holds it and touched
    all the time, so that the one of a killed process is seen to be nobody's.
    """
    with ExitStack() as held:
        waits = functools.cache(on_wait)
        try:
            while not _take_lock(path, held, waits):
                held.close()
        except OSError as e:
            if e.errno not in READ_ONLY:
                raise
            yield False
            return
        try:
            yield True
        finally:
            if not keep:
                path.unlink(missing_ok=True)


def _take_lock(path: Path, held: ExitStack, waits: Callable[[], object]) -> bool:
    """Wait for the lock; whether it is still that of the file at the path, which whoever held it may have removed."""
    file = held.enter_context(open(path, "w"))  # noqa: SIM115  # closed with held
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        held.enter_context(_locked_by_file(path.with_name(f".{path.name}.fastft-held"), waits))
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextmanager
def _locked_by_file(path: Path, waits: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Two holders at once are possible where one was stopped for long, or three processes met in a moment:
    what is made under it must not depend on who makes it.
    """
    mine = uuid.uuid4().hex
    seen, since = None, 0.0
    while True:
        with suppress(FileExistsError), open(path, "x") as f:
            f.write(mine)
            break
        with suppress(FileNotFoundError):
            found = path.read_text(), path.stat().st_mtime_ns
            if found != seen:  # by this process's clock alone: hosts need not agree on the time
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > ABANDONED:
                _take_away(path, found[0])
                continue
        waits()
        time.sleep(0.1)
    done = threading.Event()

    def touch() -> None:
        while not done.wait(TOUCHED):
            with suppress(OSError):
                if path.read_text() == mine:
                    os.utime(path)

    thread = threading.Thread(target=touch, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(FileNotFoundError):
            if path.read_text() == mine:
                path.unlink()


def _take_away(path: Path, holder: str) -> None:
    """Remove a lock that this holder left behind; that of another, who has it since, is put back."""
    aside = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
    path.rename(aside)
    if aside.read_text() != holder:
        with suppress(OSError):
            os.link(aside, path)
    aside.unlink()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> Iterator[str]:
    """Of every file in turn, on all cores: hashing a large file lets go of the interpreter's lock."""
    return in_threads(sha256_file, paths)


def in_threads(do: Callable[[Path], T], paths: Iterable[Path]) -> Iterator[T]:
    """``do(path)`` of every path in turn, with a thread for each core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(do, paths)


class Later(Generic[T]):
    """What a thread of its own makes meanwhile. The process does not wait for it at its end."""

    def __init__(self, do: Callable[[], T]):
        self._do = do
        self._found: list[T] = []
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._do())
        except BaseException as e:
            self._problem = e

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        """Waits for it; raises what it raised."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        return self._found[0]


def digest(value: object) -> str:
    """A short stable digest of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
