"""Writing checkpoints beside the training: a snapshot in memory, then a thread per rank that writes, hashes and syncs
it.

The threads of a job meet through files, for a collective in a thread would get between those of the training: each
leaves ``rank-N.json`` (its files' sizes and hashes) in the scratch folder when its part is on the disk, and rank 0's,
once all are there, writes the manifest, renames the folder and replaces LATEST. Until then the checkpoint does not
exist.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fastft.errors import UserError
from fastft.files import fsync, replacing
from fastft.ranks import Ranks
from fastft.zero import state_files
from fastft.zero.snapshots import bytes_of

POLL = 0.02  # seconds
PART, SYNC = 1 << 20, 32 << 20  # bytes written at a time, and before the disk is waited for
POINTS = (
    "begin",
    "snapshot",
    "before-file",
    "after-file",
    "before-report",
    "after-report",
    "before-manifest",
    "before-rename",
    "before-latest",
    "before-prune",
)


def point(name: str, rank: int) -> None:
    """A named moment of a save, at which a test has a rank killed: FASTFT_KILL_AT=name:rank, or name:rank:file for
    once (the file marks it).
    """
    wanted = os.environ.get("FASTFT_KILL_AT", "").split(":", 2)
    if wanted[:2] != [name, str(rank)]:
        return
    if len(wanted) == 3:
        try:
            os.close(os.open(wanted[2], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)


class _Stream:
    """A new file, synced and hashed as it is written."""

    def __init__(self, path: Path, moved: Callable[[], None]):
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115  # until finish()
        self.moved = moved
        self.hash, self.bytes, self.unsynced = hashlib.sha256(), 0, 0
        self.pending = bytearray()  # small pieces, less than PART of them

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        if len(self.pending) + len(view) < PART:
            self.pending += view
            return
        self._write_all(memoryview(self.pending))
        self.pending = bytearray()
        self._write_all(view)

    def _write_all(self, view: memoryview) -> None:
        for start in range(0, len(view), PART):
            self._write(view[start : start + PART])

    def _write(self, part: memoryview) -> None:
        self.hash.update(part)
        self.bytes += len(part)
        self.unsynced += len(part)
        while part:
            part = part[self.file.write(part) :]
        if self.unsynced >= SYNC:
            os.fdatasync(self.file.fileno())
            self.unsynced = 0
        self.moved()

    def finish(self) -> dict:
        """The manifest's entry of the file, which is on the disk now."""
        self._write_all(memoryview(self.pending))
        os.fsync(self.file.fileno())
        self.moved()
        return {"bytes": self.bytes, "sha256": self.hash.hexdigest()}


class Writer:
    """At most one checkpoint on its way to the disk.

    Attributes
    ----------
    problem : str
        Why this rank's last write failed; empty: it did not.
    moved : int
        Grows while the write gets on; stands still while it waits for the disk, or for other ranks.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.problem = ""
        self.moved = 0
        self.thread: threading.Thread | None = None
        self.abandoned = threading.Event()

    def write(self, files: dict[Path, object], scratch: Path, finish: Callable[[dict[str, dict]], None]) -> None:
        """Begin to write ``files`` (path -> state) into ``scratch``; on rank 0 ``finish(manifest's files)`` follows
        when all ranks are done.

        The write before this one must be done.
        """
        assert not self.busy()
        self.thread = threading.Thread(target=self._run, args=(files, scratch, finish), name="checkpoint", daemon=True)
        self.thread.start()

    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Until this rank's part is done (on rank 0: all ranks'). Not where another rank may have failed; see
        Saver.settle.
        """
        if self.thread is not None:
            self.thread.join()

    def close(self) -> None:
        """The run is over: the other ranks get a moment to finish what rank 0 waits for, then it is given up."""
        if self.thread is not None:
            self.thread.join(timeout=10)
        self.abandoned.set()
        self.wait()

    def move(self) -> None:
        """What writes says so."""
        self.moved += 1

    def _run(self, files: dict[Path, object], scratch: Path, finish: Callable[[dict[str, dict]], None]) -> None:
        path = scratch
        try:
            self._check_space(files, scratch)
            entries = {}
            for path, state in files.items():
                point("before-file", self.ranks.rank)
                with _Stream(path, self.move) as stream:
                    state_files.write(state, stream)
                    point("after-file", self.ranks.rank)
                    entries[str(path.relative_to(scratch))] = stream.finish()
            point("before-report", self.ranks.rank)
            with replacing(scratch / f"rank-{self.ranks.rank}.json") as report:
                report.write_text(json.dumps(entries))
                fsync(report)
            point("after-report", self.ranks.rank)
            if self.ranks.main and (every := self._reports(scratch)) is not None:
                finish(every)
        except UserError as e:
            self.problem = str(e)
        except Exception as e:  # the training must hear of all
            self.problem = f"{path}: writing the checkpoint failed: {e}"

    def _check_space(self, files: dict[Path, object], scratch: Path) -> None:
        need, free = (
            int(1.02 * bytes_of(list(files.values())) * self.ranks.local_world),
            shutil.disk_usage(scratch).free,
        )
        if need > free:
            raise UserError(
                f"{scratch.parent}: the checkpoint needs {need / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left.",
                "Make room, or lower checkpoint.keep (one more than it is on the disk during a save).",
            )

    def _reports(self, scratch: Path) -> dict[str, dict] | None:
        """What all ranks have written, when all have; None when the run ends before."""
        entries: dict[str, dict] = {}
        for rank in range(self.ranks.world):
            report = scratch / f"rank-{rank}.json"
            while not report.exists():
                if self.abandoned.is_set():
                    return None
                time.sleep(POLL)
            entries |= json.loads(report.read_text())
        for rank in range(self.ranks.world):
            (scratch / f"rank-{rank}.json").unlink()
        return entries
