"""`fastft prepare`: from raw files to shards of tokens behind a manifest.

One process reads, several clean and tokenize, the first one leaves out duplicates and writes, in the order of the
files: the result does not depend on how many there are. When a shard is complete, what has been done until then is
written down; a run that was killed goes on from there, and its result is the same to the byte.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fastft.config.corpus import CorpusConfig
from fastft.corpus import output as folder_of
from fastft.corpus import removal, tokens
from fastft.corpus.duplicates import Filter
from fastft.corpus.files import DataFile, changed, files_of, hashes
from fastft.corpus.manifest import left_out, manifest_of
from fastft.corpus.minhash import VERSION
from fastft.corpus.output import JOBS, NEAR, SCRATCH
from fastft.corpus.pool import in_order
from fastft.corpus.reading import BLOCK_CHARACTERS, Block, Position, Reader, fault
from fastft.corpus.removal import Removal
from fastft.corpus.rules.base import chosen
from fastft.corpus.shards import (
    MANIFEST,
    PROGRESS,
    Corpus,
    Shard,
    ShardWriter,
    as_json,
    check_shard,
    is_corpus,
)
from fastft.corpus.work import Count, Done, place_name
from fastft.data.prepared import disk_told
from fastft.errors import UserError
from fastft.files import Later, digest, remove

log = logging.getLogger(__name__)

LOOKED = 64  # blocks of a source in which texts are looked for that tell about the tokenizer
CODE = 3  # raise it when the same files and settings give another corpus
NO_PART_OF_THE_KEY = {"output", "workers", "executor", "encoder", "tokenizer", "revision", "remove"}
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
    files = [files_of(source, config.max_document_bytes) for source in config.sources]
    folder_of.check(config, output, files)
    output.parent.mkdir(parents=True, exist_ok=True)
    with folder_of.alone(output):
        before = folder_of.recorded(output)
        removal.finish(output)
        build = Build(config, output, files, before.get("files", {}))
        if is_corpus(output) and not overwrite:
            corpus = Corpus(output)
            if corpus.manifest["key"] == build.key:
                corpus.verify()
                folder_of.finished(output)  # it may have been killed right behind its manifest
                return corpus
            if removal.fits(corpus, build):
                corpus.verify()
                folder_of.finished(output)
                with disk_told(output, "the shards", "Make room and run again."):
                    removal.take_out(corpus, build)
                return Corpus(output)
            raise UserError(
                f"{output}: holds a corpus that was made from other files or settings.",
                "Choose another output, or replace it: fastft prepare --overwrite.",
            )
        if not before or before.get("key") != build.key:
            folder_of.clear(output, overwrite)
            before = {}
        try:
            with disk_told(output.parent, "the corpus", "Make room and run again: complete shards stay."):
                build.run(before, report)
        except tokens.Differs as e:
            log.warning("gigatoken gives other ids for a document (%.60r): all are tokenized anew without it", str(e))
            build.duplicates.close()
            folder_of.clear(output, True)
            build = Build(config.changed(encoder="tokenizers"), output, files, build.found)
            build.why = "gigatoken gave other ids for a document"
            build.run({}, report)
        return Corpus(output)


class Build:
    """A corpus while it is made.

    Attributes
    ----------
    found : dict of str
        SHA-256 of every file that is read: they are hashed while the processes start, and reading begins.
    base, key : str
        Digest of all that the result depends on, without and with the documents that are taken out.
    shards : list of Shard
    counts : list of dict
        Of each source, by rule.
    """

    def __init__(self, config: CorpusConfig, output: Path, files: list[list[DataFile]], known: dict[str, dict]):
        self.config, self.output, self.files = config, output, files
        self.rules = chosen(config)
        self.facts = tokens.facts_of(config.tokenizer, config.revision)
        self.beside = [(name, file) for name, kind, settings in self.rules for file in kind.files(settings)]
        self.states = [file.state() for file in self._files()]
        self.hashing = Later(lambda: hashes(self._files(), known))
        self.why = ""
        self.removal = Removal(removal.ids_of(config), [])
        self.rows: list[int] = []  # documents of every shard that is complete, with those that were taken out
        self.shards: list[Shard] = []
        self.names: list[list[str]] = [[] for _ in files]
        self.counts: list[dict[str, Count]] = [{} for _ in files]
        self.broken: list[dict[str, str]] = [{} for _ in files]
        self.empty: list[str] = []
        self.position, self.fast = Position(), False
        self.left: tuple[int, int] | None = None  # the file of a source that cannot be read on
        self.reader = Reader(config, files, self.names)
        self.duplicates = Filter(config.duplicates, output / NEAR)
        self.writer: ShardWriter | None = None
        self.sizes = [[file.size() for file in group] for group in files]

    @property
    def found(self) -> dict[str, dict]:
        return self.hashing.result()

    @cached_property
    def base(self) -> str:
        config = self.config
        rules = {name: {"version": kind.version, **kind.versions()} for name, kind, _ in self.rules}
        settings = config.model_dump(mode="json", exclude=NO_PART_OF_THE_KEY)
        names = [[[file.where, self.found[file.where]["sha256"]] for file in group] for group in self.files]
        beside = [[name, self.found[file.where]["sha256"]] for name, file in self.beside]
        if config.duplicates.near is not None:
            rules["near"] = {"version": VERSION, "unicode": unicodedata.unidata_version}
        return digest([CODE, settings, rules, self.facts.key, names, beside, self.facts.split])

    @property
    def key(self) -> str:
        return digest([self.base, self.removal.ids]) if self.removal.ids else self.base

    def _files(self) -> list[DataFile]:
        """All that is read: of the sources, and by rules beside them."""
        return [file for group in self.files for file in group] + [file for _, file in self.beside]

    def run(self, before: dict[str, Any], report: Report) -> None:
        if before:
            self._restore(before)
        else:
            self.output.mkdir(exist_ok=True)

        def setup() -> tuple[Any, ...]:
            if not before:
                self._choose()
            return self.config.model_dump(mode="json"), self.facts, self.fast

        for block, done in in_order(self.reader.blocks(self.position), self.config, setup, self.output / JOBS):
            self._take(block, done)
            report(self)
        self._commit()
        self._finish()

    def _choose(self) -> None:
        """The encoder."""
        self.fast, why = tokens.choose(self.facts, self.config.encoder, self._sample())
        self.why = self.why or why
        log.info("encoder %s: %s", "gigatoken" if self.fast else "tokenizers", self.why)
        self._save(begun=not self.hashing.done)

    def without_removal(self) -> dict[str, str]:
        """For the manifest: the key of the same corpus with the documents that were taken out, if there are such."""
        return {"before_removal": self.base} if self.removal.ids else {}

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
            reader, own = Reader(self.config, self.files, [[] for _ in self.files]), list[str]()
            for block in islice(reader.blocks(Position(number)), LOOKED):
                own += block.rows.rows()[0].texts if block.source == number else []
                if len(own) >= each or sum(map(len, own)) >= BLOCK_CHARACTERS or block.source > number:
                    break
            found += [text[: tokens.LONGEST] for text in own[:each]]
        return found

    def _take(self, block: Block, done: Done) -> None:
        if (block.source, block.file) == self.left:
            return
        if done.broken is not None:
            file = self.files[block.source][block.file]
            block.broken[file.where] = fault(done.broken, self.config)
            block.end, self.left = Position(block.source, block.file + 1), (block.source, block.file)
        writer = self.writer
        full = writer is not None and writer.room + len(done.tokens) > self.config.shard_tokens
        if writer is not None and (full or writer.source != block.source):
            self._commit()
        counts = self.counts[block.source]
        for read in (block.read, done.read):
            counts.setdefault("reading", Count()).add(read)
        for name, count in done.counts.items():
            counts.setdefault(name, Count()).add(count)
        self.broken[block.source] |= block.broken
        self.empty += block.empty
        if self.duplicates.on:
            done = self.duplicates.without(done, counts.setdefault("duplicates", Count()), self._where)
        if len(done.lengths):
            if self.writer is None:
                folder = self.output / "shards" / _name(len(self.rows))
                self.writer = ShardWriter(self.output / SCRATCH, folder, block.source, self.facts.dtype)
            kept = self.removal.kept(np.frombuffer(b"".join(done.ids), np.uint8).reshape(-1, 16))
            self.removal.add(
                done, kept, str(self.config.sources[block.source].name), self.writer.folder.name, self.writer.rows
            )
            self.writer.append(done, kept)
        self.position = block.end

    def _where(self, number: int) -> str:
        """Of a document that stays or was taken out, in words."""
        for at, rows in enumerate(self.rows):  # noqa: B007  # the last is that of the shard that is written
            if number < rows:
                break
            number -= rows
        else:
            at = len(self.rows)
        if (where := self.removal.where(_name(at), number)) is not None:
            return where
        number -= sum(row < number for row in self.removal.rows(_name(at)))
        if at < len(self.rows):
            shard = next(shard for shard in self.shards if shard.name == _name(at))
            source, places = shard.source, np.load(self.output / "shards" / shard.name / "places.npy", mmap_mode="r")
        else:
            assert self.writer is not None
            source, places = self.writer.source, np.concatenate(self.writer.places)
        return place_name(self.names[source], *places[number].tolist())

    def _commit(self) -> None:
        """The shard is complete, and what has been done until here is written down."""
        if self.writer is not None:
            self.rows.append(self.writer.rows)
            if self.writer.documents:
                self.shards.append(self.writer.close())
            else:
                self.writer.drop()
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
            "empty": self.empty,
            "duplicates": self.duplicates.state(),
            "shards": as_json(self.shards),
            "rows": self.rows,
            "removed": self.removal.entries,
        }

    def _save(self, begun: bool = False) -> None:
        """``begun``: no more than that, which a run behind this one begins anew."""
        state = {"key": None} if begun else self._state()
        folder_of.write(self.output / PROGRESS, {**state, "digest": digest(state)})

    def _restore(self, before: dict[str, Any]) -> None:
        self.fast, self.why = before["encoder"]
        self.position = Position(**before["position"])
        for names, known in zip(self.names, before["names"], strict=True):
            names[:] = known
        self.counts = [{name: Count(**count) for name, count in group.items()} for group in before["counts"]]
        self.broken, self.empty = before["broken"], before["empty"]
        self.shards = [Shard(**shard) for shard in before["shards"]]
        self.rows, self.removal.entries = before["rows"], before["removed"]
        kept = {shard.name for shard in self.shards}
        for shard in self.shards:
            check_shard(self.output / "shards" / shard.name, shard)
        ids = (np.load(self.output / "shards" / shard.name / "ids.npy") for shard in self.shards)
        self.duplicates.restore(before["duplicates"], chain(ids, [self.removal.seen()]))
        if (self.output / "shards").is_dir():
            for folder in (self.output / "shards").iterdir():
                if folder.name not in kept:  # renamed, but not written down
                    remove(folder)
        log.info("going on after %d shards", len(self.shards))

    def _finish(self) -> None:
        """Compare the files once more, and write the manifest."""
        if (name := changed(self._files(), self.states, self.found)) is not None:
            raise UserError(f"{name}: changed while it was read.", "Run again when nothing writes to it any more.")
        if not self.shards:
            raise UserError(f"{self.output}: no document is left. {left_out(self)}", "Loosen the rules.")
        (self.output / "shards").mkdir(exist_ok=True)
        manifest = manifest_of(self)
        folder_of.write(self.output / MANIFEST, {**manifest, "digest": digest(manifest)})
        self.duplicates.close()
        folder_of.finished(self.output)


def _name(shard: int) -> str:
    return f"{shard:05d}"
