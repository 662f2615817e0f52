"""Documents that are taken out of a corpus by their ids (``remove``).

They are taken out behind everything else: what was left out beside them, as like them, does not come back, and shards
begin and end where they would with them. So all other shards are the same to the byte, and of a corpus that is there
already the shards that hold such documents alone are written anew.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.config.corpus import CorpusConfig
from fastft.corpus import output as folder_of
from fastft.corpus.lookup import is_id
from fastft.corpus.manifest import summed
from fastft.corpus.output import REMOVING
from fastft.corpus.seen import KIND
from fastft.corpus.shards import AGAIN, MANIFEST, Corpus, Shard, ShardWriter, as_json
from fastft.corpus.work import Done
from fastft.errors import UserError
from fastft.files import digest, fsync, remove

if TYPE_CHECKING:
    from fastft.corpus.build import Build

log = logging.getLogger(__name__)
PIECE = 10_000  # documents that are copied at a time


def ids_of(config: CorpusConfig) -> list[str]:
    """The ids that ``remove`` says, those in files too: lower case, sorted, each once. UserError for what is none."""
    found = set()
    for said in config.remove:
        if is_id(said):
            found.add(said.lower())
            continue
        try:
            lines = Path(said).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as e:
            raise UserError(
                f"remove: {said!r} is no id of a document, and no file of ids: {e}.",
                "An id has 32 hexadecimal digits: fastft inspect CORPUS --document source:file:row.",
            ) from None
        for number, line in enumerate(lines, 1):
            if not (line := line.partition("#")[0].strip()):
                continue
            if not is_id(line):
                raise UserError(
                    f"remove: {said}:{number}: {line[:40]!r} is no id.",
                    "Write one on each line, 32 hexadecimal digits: fastft inspect CORPUS --document source:file:row.",
                )
            found.add(line.lower())
    return sorted(found)


class Removal:
    """What is to be taken out of a corpus, and what was.

    Attributes
    ----------
    ids : list of str
        Of documents to be taken out, sorted.
    entries : list of dict
        Those that were: ``id``, ``source``, ``where``, ``shard``, ``row`` (among the shard's documents, with those that
        were taken out), ``tokens`` and ``characters``.
    """

    def __init__(self, ids: list[str], entries: list[dict[str, Any]]):
        self.ids, self.entries = ids, entries
        self._wanted = np.frombuffer(bytes.fromhex("".join(ids)), KIND)

    def kept(self, ids: np.ndarray) -> np.ndarray:
        """(documents,) bool. ``ids``: (documents, 16) uint8."""
        return ~np.isin(np.ascontiguousarray(ids).view(KIND).ravel(), self._wanted)

    def add(self, done: Done, kept: np.ndarray, source: str, shard: str, first: int) -> None:
        """``first``: row of the first of these documents."""
        for i in np.flatnonzero(~kept).tolist():
            entry = {"id": done.ids[i].hex(), "source": source, "where": done.where(i), "shard": shard}
            numbers = {"row": first + i, "tokens": int(done.lengths[i]), "characters": int(done.characters[i])}
            self.entries.append(entry | numbers)

    def rows(self, shard: str) -> list[int]:
        """Of those that were taken out of a shard, ascending."""
        return sorted(entry["row"] for entry in self.entries if entry["shard"] == shard)

    def where(self, shard: str, row: int) -> str | None:
        """Of a document that was taken out; None: it was not."""
        at = (entry["where"] for entry in self.entries if (entry["shard"], entry["row"]) == (shard, row))
        return next(at, None)

    def seen(self) -> np.ndarray:
        """(n, 16) uint8: ids of those that were."""
        ids = sorted({entry["id"] for entry in self.entries})
        return np.frombuffer(bytes.fromhex("".join(ids)), np.uint8).reshape(-1, 16)

    def told(self) -> dict[str, Any]:
        """For the manifest; nothing where nothing is to be taken out."""
        if not self.ids:
            return {}
        entries = sorted(self.entries, key=lambda entry: (entry["shard"], entry["row"]))
        missed = sorted(set(self.ids) - {entry["id"] for entry in entries})
        if missed:
            log.warning("remove: %d ids are of no document: %s", len(missed), ", ".join(missed[:3]))
        return {"removed": entries, "not_found": missed}


def fits(corpus: Corpus, build: Build) -> bool:
    """Whether a corpus differs from what is to be made by documents alone that are to be taken out of it. UserError
    where some are to come back.
    """
    said = corpus.manifest
    if said.get("before_removal", said["key"]) != build.base:
        return False
    gone = {entry["id"] for entry in said.get("removed", [])}
    if back := gone - set(build.removal.ids):
        raise UserError(
            f"{corpus.folder}: {len(back):,} documents were removed that are no more named by remove: {min(back)} ...",
            "Name them, or have the corpus made anew with them: fastft prepare --overwrite.",
        )
    return True


def take_out(corpus: Corpus, build: Build) -> None:
    """Write the shards anew that hold documents to be taken out, then the manifest: that of a corpus that was made
    without them. What is killed is finished, or was nothing, when it is started again.
    """
    scratch = corpus.folder / REMOVING
    (scratch / "shards").mkdir(parents=True)
    removal = Removal(build.removal.ids, list(corpus.manifest.get("removed", [])))
    shards, written = list[Shard](), 0
    for number, shard in enumerate(corpus.shards):
        kept = removal.kept(corpus.ids(number))
        if kept.all():
            shards.append(shard)
            continue
        if (found := _written(corpus, number, kept, removal, scratch)) is not None:
            shards.append(found)
        written += 1
    if not shards:
        remove(scratch)
        raise UserError(f"{corpus.folder}: no document would be left.", "Name fewer in remove.")
    told = ("before_removal", "removed", "not_found")  # said anew, or nothing where remove has become empty
    said = {name: value for name, value in corpus.manifest.items() if name not in told}
    manifest = said | {"key": build.key, "totals": summed(shards), **build.without_removal(), **removal.told()}
    manifest["settings"] = said["settings"] | {"remove": build.config.remove}
    manifest["sources"] = [
        source | summed([shard for shard in shards if shard.source == number])
        for number, source in enumerate(said["sources"])
    ]
    manifest["shards"] = as_json(shards)
    folder_of.write(scratch / MANIFEST, {**manifest, "digest": digest(manifest)})
    finish(corpus.folder)
    taken = len(removal.entries) - len(corpus.manifest.get("removed", []))
    log.info("removed %d documents; %d of %d shards were written anew", taken, written, len(corpus.shards))


def _written(corpus: Corpus, number: int, kept: np.ndarray, removal: Removal, scratch: Path) -> Shard | None:
    """A shard without some documents; None where none is left. ``kept``: (documents,) bool."""
    shard, tokens, ids, places = corpus.shards[number], corpus.tokens(number), corpus.ids(number), corpus.places(number)
    characters = corpus.characters(number)
    source = corpus.manifest["sources"][shard.source]
    gone = removal.rows(shard.name)
    rows = np.setdiff1d(np.arange(shard.documents + len(gone)), gone)  # with those that were taken out before
    writer = ShardWriter(scratch / ".shard", scratch / "shards" / shard.name, shard.source, corpus.dtype.str)
    for at in range(0, shard.documents, PIECE):
        part = slice(at, min(at + PIECE, shard.documents))
        begins = np.asarray(tokens.offsets[part.start : part.stop + 1])
        done = Done(
            np.asarray(places[part]),
            dict(enumerate(source["places"])),
            [row.tobytes() for row in ids[part]],
            np.asarray(tokens.values[begins[0] : begins[-1]]),
            np.diff(begins),
            np.asarray(characters[part], np.int64),
            {},
        )
        before = len(removal.entries)
        removal.add(done, kept[part], source["name"], shard.name, at)
        for entry in removal.entries[before:]:
            entry["row"] = int(rows[entry["row"]])
        writer.append(done, kept[part])
    if not writer.documents:
        (scratch / "shards" / shard.name).mkdir()  # takes the place of the shard, and is in no manifest
        writer.drop()
        return None
    return writer.close()


def finish(output: Path) -> None:
    """Put new shards and their manifest in the place of the old ones, if all were written; else take them away."""
    scratch = output / REMOVING
    if (scratch / MANIFEST).is_file():
        try:
            names = {shard["name"] for shard in json.loads((scratch / MANIFEST).read_bytes())["shards"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{scratch / MANIFEST}: is not as it was written.", AGAIN) from None
        for folder in sorted((scratch / "shards").iterdir()):
            remove(output / "shards" / folder.name)
            if folder.name in names:
                folder.rename(output / "shards" / folder.name)
        fsync(output / "shards")
        (scratch / MANIFEST).rename(output / MANIFEST)
        fsync(output)
    remove(scratch)
