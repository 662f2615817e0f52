"""The folder that a corpus is made in: what may be in it, what is written down there meanwhile, and what is removed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastft.config.corpus import CorpusConfig
from fastft.corpus.files import DataFile
from fastft.corpus.shards import MANIFEST, PROGRESS, REMOVING, begun, is_corpus
from fastft.data.prepared import LITTER
from fastft.data.sources import holds
from fastft.errors import UserError
from fastft.files import digest, locked, remove, replacing

log = logging.getLogger(__name__)

SCRATCH, NEAR, JOBS = ".shard", ".near", ".jobs"  # of the shard that is written; of near-duplicates; of Slurm


def write(path: Path, value: dict[str, Any]) -> None:
    """A JSON file, whole and on the disk."""
    with replacing(path) as scratch, open(scratch, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)  # escaped: names of files need not be Unicode
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold the folder's lock, so that one process makes the corpus at a time. UserError where it cannot be written."""
    path = output.with_name(output.name + ".lock")

    def told() -> None:
        log.warning("%s: another process makes this corpus (it holds %s): waiting until it is done", output, path.name)

    with locked(path, keep=False, on_wait=told) as writable:
        if not writable:
            raise UserError(f"{output}: cannot be written.", "Choose another output.")
        yield


def recorded(output: Path) -> dict[str, Any]:
    """What a run before has written down, with its digest; nothing where it is broken, or was changed."""
    with suppress(OSError, ValueError):
        found = json.loads((output / PROGRESS).read_bytes())
        if isinstance(found, dict) and found.pop("digest", None) == digest(found):
            return found
        log.warning("%s: is not as it was written: what was begun is made anew", output / PROGRESS)
    return {}


def check(config: CorpusConfig, output: Path, files: list[list[DataFile]]) -> None:
    """UserError for an output that is an input, holds one, or lies in one; and for one that holds other files."""
    whole = output.resolve()
    for source in config.sources:
        if not source.remote and Path(source.path).is_dir() and holds(Path(source.path), output):
            raise UserError(f"{output}: lies in the folder that is read ({source.path}).", "Choose another output.")
    for file in (file for group in files for file in group if "://" not in file.where):
        if whole in (path := Path(file.where).resolve(), *path.parents):
            raise UserError(f"{output}: is or holds a file that is read ({file}).", "Choose another output.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file.", "Choose another output.")
    known = {MANIFEST, PROGRESS, SCRATCH, NEAR, JOBS, REMOVING, "shards", *LITTER}
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    ours = is_corpus(output) or recorded(output) or begun(output) or not there
    strangers = sorted(n for n in there - (known if ours else set(LITTER)) if ".fastft-" not in n)
    if strangers:
        raise UserError(
            f"{output}: holds other files: {', '.join(strangers[:5])}.", "Choose another output; nothing was touched."
        )


def clear(output: Path, overwrite: bool) -> None:
    """Take away what an unfinished run, or with ``overwrite`` a finished one, has left."""
    if overwrite or not is_corpus(output):
        # the manifest first: without it nothing is done
        for name in (MANIFEST, PROGRESS, SCRATCH, NEAR, REMOVING, "shards"):
            remove(output / name)


def finished(output: Path) -> None:
    """Take away what a corpus that has its manifest needs no more."""
    for name in (SCRATCH, NEAR, JOBS, PROGRESS):
        remove(output / name)
