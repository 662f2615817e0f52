"""`fastft prepare`: from raw files to shards of tokens behind a manifest.

One process reads, several clean and tokenize, the first one leaves out duplicates and writes, in the order of the
files: the result does not depend on how many there are. When a shard is complete, what has been done until then is
written down; a run that was killed goes on from there, and its result is the same to the byte.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastft.config.corpus import CorpusConfig
from fastft.corpus import tokens
from fastft.corpus.files import DataFile, files_of, hashes
from fastft.corpus.pool import in_order
from fastft.corpus.reading import Block, Position, Reader
from fastft.corpus.rules.base import chosen
from fastft.corpus.seen import Seen
from fastft.corpus.shards import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    Corpus,
    Shard,
    ShardWriter,
    as_json,
    begun,
    check_shard,
    is_corpus,
)
from fastft.corpus.work import Count, Done
from fastft.data.prepared import LITTER, disk_told
from fastft.data.sources import holds
from fastft.errors import UserError
from fastft.files import digest, locked, remove, replacing

log = logging.getLogger(__name__)

CODE = 1  # raise it when the same files and settings give another corpus
SCRATCH = ".shard"
NO_PART_OF_THE_KEY = {"output", "workers", "encoder", "tokenizer", "revision"}
Report = Callable[["Build"], None]


def prepare(config: CorpusConfig, overwrite: bool = False, report: Report = lambda build: None) -> Corpus:
    """Make a corpus, go on with one that was interrupted, or open the one that is there from the same files.

    Parameters
    ----------
    overwrite : bool
        Replace a corpus that was made from other files or settings.
    report : callable
        Called after every block.

    Raises
    ------
    UserError
        A file that cannot be read, a row that the settings do not fit, an output that holds other files.
    """
    output = Path(config.output)
    files = [files_of(source, config) for source in config.sources]
    _check_output(config, output, files)
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output.with_name(output.name + ".lock")) as writable:
        if not writable:
            raise UserError(f"{output}: cannot be written.", "Choose another output.")
        before = _recorded(output)
        build = Build(config, output, files, before.get("files", {}))
        if is_corpus(output) and not overwrite:
            corpus = Corpus(output)
            if corpus.manifest["key"] == build.key:
                corpus.verify()
                return corpus
            raise UserError(
                f"{output}: holds a corpus that was made from other files or settings.",
                "Choose another output, or replace it: fastft prepare --overwrite.",
            )
        if before.get("key") != build.key:
            _clear(output, overwrite)
            before = {}
        try:
            with disk_told(output.parent, "the corpus", "Make room and run again: complete shards stay."):
                build.run(before, report)
        except tokens.Differs as e:
            log.warning("gigatoken gives other ids for a document (%.60r): all are tokenized anew without it", str(e))
            _clear(output, True)
            build = Build(config.changed(encoder="tokenizers"), output, files, build.found)
            build.why = "gigatoken gave other ids for a document"
            build.run({}, report)
        return Corpus(output)


class Build:
    """A corpus while it is made.

    Attributes
    ----------
    key : str
        Digest of all that the result depends on.
    shards : list of Shard
    counts : list of dict
        Of each source, by rule.
    """

    def __init__(self, config: CorpusConfig, output: Path, files: list[list[DataFile]], known: dict[str, dict]):
        self.config, self.output, self.files = config, output, files
        self.rules = chosen(config)
        self.facts = tokens.facts_of(config.tokenizer, config.revision)
        self.found = hashes([file for group in files for file in group], known)
        self.why = ""
        rules = {name: {"version": kind.version, **kind.versions()} for name, kind, _ in self.rules}
        settings = config.model_dump(mode="json", exclude=NO_PART_OF_THE_KEY)
        names = [[[file.where, self.found[file.where]["sha256"]] for file in group] for group in files]
        self.key = digest([CODE, settings, rules, self.facts.key, names, self._besides()])
        self.shards: list[Shard] = []
        self.names: list[list[str]] = [[] for _ in files]
        self.counts: list[dict[str, Count]] = [{} for _ in files]
        self.broken: list[dict[str, str]] = [{} for _ in files]
        self.position, self.fast = Position(), False
        self.reader = Reader(config, files, self.names)
        self.seen = Seen()
        self.writer: ShardWriter | None = None
        self.sizes = [[file.size() for file in group] for group in files]

    def _besides(self) -> list[Any]:
        """What else rules read."""
        found = []
        for name, kind, settings in self.rules:
            for source in kind.sources(settings):
                files = files_of(source, self.config)
                found.append([name, [entry["sha256"] for entry in hashes(files, {}).values()]])
        return found

    def run(self, before: dict[str, Any], report: Report) -> None:
        if before:
            self._restore(before)
        else:
            self.output.mkdir(exist_ok=True)
            self.fast, why = tokens.choose(self.facts, self.config.encoder, self._sample())
            self.why = self.why or why
            log.info("encoder %s: %s", "gigatoken" if self.fast else "tokenizers", self.why)
            self._save()
        workers = self.config.workers or len(os.sched_getaffinity(0))
        setup = (self.config.model_dump(mode="json"), self.facts, self.fast)
        for block, done in in_order(self.reader.blocks(self.position), workers, setup):
            self._take(block, done)
            report(self)
        self._commit()
        self._finish()

    def read(self) -> tuple[int, int]:
        """Bytes of the sources that were read, and all of them."""
        at = self.position
        sizes = [size for group in self.sizes[: at.source] for size in group]
        if at.source < len(self.sizes):
            sizes += self.sizes[at.source][: at.file]
        part = self.reader.current.position() if self.reader.current is not None and at.records else 0
        return sum(sizes) + part, sum(map(sum, self.sizes))

    def _sample(self) -> list[str]:
        each = max(1, tokens.SAMPLE // len(self.files))
        found = []
        for number in range(len(self.files)):
            reader = Reader(self.config, self.files, [[] for _ in self.files])
            for block in islice(reader.blocks(Position(number)), 1):
                found += [text[: tokens.LONGEST] for text in block.rows.texts[:each]]
        return found

    def _take(self, block: Block, done: Done) -> None:
        writer = self.writer
        full = writer is not None and writer.tokens + len(done.tokens) > self.config.shard_tokens
        if writer is not None and (full or writer.source != block.source):
            self._commit()
        counts = self.counts[block.source]
        counts.setdefault("reading", Count()).add(block.read)
        for name, count in done.counts.items():
            counts.setdefault(name, Count()).add(count)
        self.broken[block.source] |= block.broken
        if self.config.duplicates == "exact":
            done = self._without_duplicates(done, counts.setdefault("duplicates", Count()))
        if len(done.lengths):
            if self.writer is None:
                folder = self.output / "shards" / f"{len(self.shards):05d}"
                self.writer = ShardWriter(self.output / SCRATCH, folder, block.source, self.facts.dtype)
            self.writer.append(done)
        self.position = block.end

    def _without_duplicates(self, done: Done, count: Count) -> Done:
        if not done.ids:
            return done
        fresh = self.seen.new(done.ids)
        count.rows += len(fresh)
        if all(fresh):
            return done
        for i, new in enumerate(fresh):
            if not new:
                count.drop(done.where[i], "the same text", done.ids[i].hex())
        return done.only(np.array(fresh))

    def _commit(self) -> None:
        """The shard is complete, and what has been done until here is written down."""
        if self.writer is not None:
            self.shards.append(self.writer.close())
            self.writer = None
            self._save()

    def _state(self) -> dict[str, Any]:
        counts = [{name: asdict(count) for name, count in group.items()} for group in self.counts]
        return {
            "key": self.key,
            "encoder": [self.fast, self.why],
            "files": self.found,
            "position": asdict(self.position),
            "names": self.names,
            "counts": counts,
            "broken": self.broken,
            "shards": as_json(self.shards),
        }

    def _save(self) -> None:
        _write(self.output / PROGRESS, self._state())

    def _restore(self, before: dict[str, Any]) -> None:
        self.fast, self.why = before["encoder"]
        self.position = Position(**before["position"])
        for names, known in zip(self.names, before["names"], strict=True):
            names[:] = known
        self.counts = [{name: Count(**count) for name, count in group.items()} for group in before["counts"]]
        self.broken = before["broken"]
        self.shards = [Shard(**shard) for shard in before["shards"]]
        kept = {shard.name for shard in self.shards}
        for shard in self.shards:
            check_shard(self.output / "shards" / shard.name, shard)
            if self.config.duplicates == "exact":
                self.seen.add(np.load(self.output / "shards" / shard.name / "ids.npy"))
        if (self.output / "shards").is_dir():
            for folder in (self.output / "shards").iterdir():
                if folder.name not in kept:  # renamed, but not written down
                    remove(folder)
        log.info("going on after %d shards", len(self.shards))

    def _finish(self) -> None:
        """Compare the files once more, and write the manifest."""
        again = hashes([f for group in self.files for f in group if "://" not in f.where], self.found)
        for name, entry in again.items():
            if entry["sha256"] != self.found[name]["sha256"]:
                raise UserError(f"{name}: changed while it was read.", "Run again when nothing writes to it any more.")
        if not self.shards:
            said = "; ".join(f"{name}: {count.dropped:,} of {count.rows:,}" for name, count in self._totals().items())
            raise UserError(f"{self.output}: no document is left. Left out were: {said}.", "Loosen the rules.")
        (self.output / "shards").mkdir(exist_ok=True)
        manifest = self._manifest()
        _write(self.output / MANIFEST, {**manifest, "digest": digest(manifest)})
        remove(self.output / SCRATCH)
        remove(self.output / PROGRESS)

    def _totals(self) -> dict[str, Count]:
        totals: dict[str, Count] = {}
        for group in self.counts:
            for name, count in group.items():
                totals.setdefault(name, Count()).add(count)
        return {name: totals[name] for name in self._order() if name in totals}

    def _order(self) -> list[str]:
        return ["reading", *(name for name, _, _ in self.rules), "tokens", "duplicates"]

    def _manifest(self) -> dict[str, Any]:
        sums = {name: sum(getattr(s, name) for s in self.shards) for name in ("documents", "tokens", "characters")}
        sources = []
        for number, source in enumerate(self.config.sources):
            of = [shard for shard in self.shards if shard.source == number]
            files = [{"file": f.where, "sha256": self.found[f.where]["sha256"]} for f in self.files[number]]
            for entry, size in zip(files, self.sizes[number], strict=True):
                entry["bytes"] = size
                if why := self.broken[number].get(entry["file"]):
                    entry["not_read_to_its_end"] = why
            counts = self.counts[number]
            sources.append(
                {
                    "name": source.name,
                    "licence": source.licence,
                    **{name: sum(getattr(s, name) for s in of) for name in ("documents", "tokens", "characters")},
                    "rules": {n: _numbers(counts[n]) for n in self._order() if n in counts},
                    "files": files,
                    "places": self.names[number],
                }
            )
        from fastft import __version__

        return {
            "format": FORMAT,
            "key": self.key,
            "made_by": {"fastft": __version__, "python": platform.python_version(), **_libraries(self.fast)},
            "settings": self.config.model_dump(mode="json", exclude={"output", "workers"}),
            "totals": sums,
            "tokens": {
                "dtype": self.facts.dtype,
                "before": self.facts.before,
                "after": self.facts.after,
                "vocabulary": self.facts.vocabulary,
                "tokenizer": self.facts.key,
                "path": self.config.tokenizer,
                "encoder": "gigatoken" if self.fast else "tokenizers",
                "because": self.why,
            },
            "rules": {name: {**_numbers(c), "samples": c.samples} for name, c in self._totals().items()},
            "sources": sources,
            "shards": as_json(self.shards),
        }


def _numbers(count: Count) -> dict[str, Any]:
    kept = count.rows - count.dropped
    numbers = {"in": count.rows, "kept": kept, "changed": count.changed, "dropped": count.dropped}
    return {**numbers, "reasons": dict(sorted(count.reasons.items()))}


def _libraries(fast: bool) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("numpy", "tokenizers", *(["gigatoken"] if fast else []))}


def _write(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as scratch, open(scratch, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)  # escaped: names of files need not be Unicode
        f.flush()
        os.fsync(f.fileno())


def _recorded(output: Path) -> dict[str, Any]:
    """What a run before has written down; nothing where it is broken."""
    with suppress(OSError, ValueError):
        found = json.loads((output / PROGRESS).read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def _check_output(config: CorpusConfig, output: Path, files: list[list[DataFile]]) -> None:
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
    known = {MANIFEST, PROGRESS, SCRATCH, "shards", *LITTER}
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    ours = is_corpus(output) or _recorded(output) or begun(output) or not there
    strangers = sorted(n for n in there - (known if ours else set(LITTER)) if ".fastft-" not in n)
    if strangers:
        raise UserError(
            f"{output}: holds other files: {', '.join(strangers[:5])}.", "Choose another output; nothing was touched."
        )


def _clear(output: Path, overwrite: bool) -> None:
    """Take away what an unfinished run, or with ``overwrite`` a finished one, has left."""
    if overwrite or not is_corpus(output):
        for name in (MANIFEST, PROGRESS, SCRATCH, "shards"):  # the manifest first: without it nothing is taken for done
            remove(output / name)
