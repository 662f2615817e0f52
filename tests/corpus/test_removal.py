"""Documents taken out by their ids: what is left is what a corpus that was made without them is, to the byte."""

import json
import shutil
from pathlib import Path

import corpora
import jobs
import pytest

from fastft.corpus.build import prepare
from fastft.corpus.inspect import lengths
from fastft.corpus.lookup import find
from fastft.corpus.shards import Corpus, corpora_of
from fastft.errors import UserError


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Two sources in several shards, with documents that are there twice, and nearly so."""
    corpora.small_blocks(monkeypatch, 4)
    one = [corpora.prose(n) for n in range(40)]
    two = [*one[4:6], *(text + " Again." for text in one[8:12]), *(corpora.prose(n) for n in range(50, 70))]
    sources = [
        {"path": str(corpora.jsonl(tmp_path / f"{name}.jsonl", texts)), "name": name}
        for name, texts in (("one", one), ("two", two))
    ]
    return {"sources": sources, "duplicates": "near", "shard_tokens": 1500}


@pytest.fixture
def make(tmp_path, tiny_llama, settings):
    def made(name: str, report=lambda build: None, **more) -> Corpus:
        config = corpora.config_of(tmp_path / name, tiny_llama, **settings, **more)
        return prepare(config, False, report)

    return made


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of the shards."""
    files = (path for path in (folder / "shards").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def id_of(corpus: Corpus, shard: int, row: int) -> str:
    return corpus.ids(shard)[row].tobytes().hex()


def test_only_shards_that_held_it_are_written_anew(make, tmp_path):
    whole = make("a")
    assert len(whole.shards) >= 4 and "removed" not in whole.manifest
    place = find(whole, f"one:{tmp_path}/one.jsonl:9")  # in source two there is nearly the same, which stays away
    gone = [id_of(whole, *place[0]), id_of(whole, 2, 1)]
    before, manifest = marks(whole.folder), whole.manifest
    less = make("a", remove=gone)
    fresh = make("b", remove=gone)
    assert corpora.content(less.folder) == corpora.content(fresh.folder)
    after = marks(less.folder)
    touched = {whole.shards[place[0][0]].name, whole.shards[2].name}
    assert {name.split("/")[1] for name in after if after[name] != before[name]} == touched and len(touched) == 2
    assert [entry["id"] for entry in less.manifest["removed"]] == gone
    assert less.manifest["removed"][0]["where"].endswith("one.jsonl:9")
    totals = less.manifest["totals"]
    for name in ("tokens", "characters"):
        assert totals[name] == manifest["totals"][name] - sum(entry[name] for entry in less.manifest["removed"])
    assert totals["documents"] == manifest["totals"]["documents"] - 2
    with pytest.raises(UserError, match="holds no document"):
        find(less, gone[0])
    assert make("a", remove=list(reversed(gone))).digest == less.digest and marks(less.folder) == after
    less.verify()


def test_more_and_more_are_removed_until_shards_are_gone(make, tmp_path, lm_config):
    whole = make("a")
    everything = [id_of(whole, i, r) for i, s in enumerate(whole.shards) for r in range(s.documents)]
    first = [id_of(whole, 1, 0)]
    file = tmp_path / "ids.txt"
    file.write_text("# of shard 1\n" + "\n".join(id_of(whole, 1, r).upper() for r in range(whole.shards[1].documents)))
    make("a", remove=first)
    more = [*first, str(file), id_of(whole, 0, 2), id_of(whole, 0, 1)]
    less, fresh = make("a", remove=more), make("b", remove=more)
    assert corpora.content(less.folder) == corpora.content(fresh.folder)
    assert [shard.name for shard in less.shards] == [shard.name for shard in whole.shards if shard.name != "00001"]
    assert [entry["row"] for entry in less.manifest["removed"] if entry["shard"] == "00000"] == [1, 2]
    assert lengths(less)["documents"] == less.manifest["totals"]["documents"]
    lm_config["data"] |= {"train": str(less.folder), "eval": {}}
    split = jobs.task_of(lm_config).train_split()
    assert split.data.meta["documents"] == less.manifest["totals"]["documents"]
    jobs.collate(jobs.task_of(lm_config), split, range(len(split)))
    with pytest.raises(UserError, match="documents were removed that are no more named"):
        make("a", remove=more[1:2])
    with pytest.raises(UserError, match="no document would be left"):
        make("a", remove=everything)
    assert corpora.content(less.folder) == corpora.content(fresh.folder)
    with pytest.raises(UserError, match="no document is left"):
        make("c", remove=everything)


class Killed(BaseException):
    pass


def test_killed_anywhere_it_is_finished_or_was_nothing(make, tmp_path, monkeypatch):
    """At every rename that it does; no state between is opened as a corpus."""
    whole = make("a")
    gone = [id_of(whole, 0, 0), id_of(whole, 1, 1), *(id_of(whole, 2, r) for r in range(whole.shards[2].documents))]
    wanted = corpora.content(make("b", remove=gone).folder)
    rename, states = Path.rename, set()
    for last in range(20):
        folder = tmp_path / f"k{last}"
        shutil.copytree(tmp_path / "a", folder, ignore=shutil.ignore_patterns("*.lock"))
        left = [last]

        def until(path, target, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", until)
        try:
            make(folder.name, remove=gone)
            done = True
        except Killed:
            done = False
        monkeypatch.setattr(Path, "rename", rename)
        if done:
            break
        try:
            states.add(len(Corpus(folder / "out").manifest.get("removed", [])))
        except UserError:
            states.add("refused")
        make(folder.name, remove=gone)
        assert corpora.content(folder / "out") == wanted
    assert done and last >= 4 and {0, "refused"} <= states <= {0, "refused", len(gone)}


def test_a_preparation_that_is_interrupted_goes_on_without_them(make):
    whole = make("a")
    gone = [id_of(whole, 0, 0), id_of(whole, 1, 1), id_of(whole, 3, 0), "0" * 32]
    calls = []
    wanted = make("b", lambda build: calls.append(1), remove=gone)
    assert wanted.manifest["not_found"] == ["0" * 32] and len(wanted.manifest["removed"]) == 3
    for last in range(2, len(calls), 3):
        left = [last]

        def report(build, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(f"c{last}", report, remove=gone)
        again = make(f"c{last}", remove=gone)
        assert corpora.content(again.folder) == corpora.content(wanted.folder)


def test_what_is_no_id_is_told(make, tmp_path):
    for ids in ([int("1" * 32)], 12, ["0" * 32, 1e308]):  # as YAML reads digits, with and without an e
        with pytest.raises(UserError, match=r"remove: [0-9.e+]+ is what YAML makes of digits, .*the id in quotes"):
            make("a", remove=ids)
    with pytest.raises(UserError, match="'nothing' is no id of a document, and no file of ids"):
        make("a", remove="nothing")
    (tmp_path / "ids.txt").write_text("0" * 32 + "\nabc\n")
    with pytest.raises(UserError, match=r"ids\.txt:2: 'abc' is no id"):
        make("a", remove=[str(tmp_path / "ids.txt")])
    whole = make("a")
    (whole.folder / ".removing").mkdir()
    (whole.folder / ".removing" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is a corpus that is not complete"):
        corpora_of("train", [type("Source", (), {"path": str(whole.folder)})()])
    with pytest.raises(UserError, match="is not as it was written"):
        make("a")
    assert json.loads((whole.folder / "manifest.json").read_text())["digest"] == whole.digest
