"""SIGKILL at random moments, then the same command again: the bytes of an undisturbed run. Two at once: one of them."""

import os
import shutil
import signal
import time
from pathlib import Path

import corpora
import killing
import pytest
from test_importing import ds, megatron

import launch
from fastft.corpus.shards import PROGRESS, Corpus

LONG = pytest.mark.long


@pytest.fixture(scope="module")
def raw(tmp_path_factory, tiny_llama):
    return killing.raw_corpus(tmp_path_factory.mktemp("raw"), tiny_llama)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, raw):
    """The corpus that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    killing.done(killing.fastft(folder, "prepare", written(folder, raw)))
    return Corpus(folder / "out")


def written(folder: Path, raw: dict, **settings) -> Path:
    return launch.write_config(folder / "corpus.yaml", {**raw, "output": str(folder / "out"), **settings})


@pytest.mark.parametrize(
    "workers, kills",
    [(1, 8), (2, 2), *(pytest.param(workers, 20, marks=LONG) for workers in (1, 2, 4))],
)
def test_prepare(tmp_path, raw, whole, workers, kills):
    parts = killing.killed(tmp_path, kills, lambda f: ["prepare", written(f, raw, workers=workers)], workers)
    assert parts or kills < 8
    assert corpora.content(tmp_path / "whole" / "out") == corpora.content(whole.folder)
    dropped = {name: rule["dropped"] for name, rule in whole.manifest["rules"].items()}
    assert dropped["decontaminate"] and dropped["length"] and dropped["duplicates"] >= 30 and len(whole.shards) >= 4


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=LONG)])
def test_removal(tmp_path, raw, whole, kills):
    """Of documents of several shards."""
    ids = [whole.ids(shard)[row].tobytes().hex() for shard in (0, 1, 3) for row in (0, 5)]

    def prepared(folder):
        shutil.copytree(whole.folder, folder / "out")
        return ["prepare", written(folder, raw, remove=ids)]

    killing.killed(tmp_path, kills, prepared)
    less = Corpus(tmp_path / "whole" / "out")
    assert less.manifest["totals"]["documents"] == whole.manifest["totals"]["documents"] - len(ids)


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=LONG)])
def test_import(tmp_path, tiny_llama, whole, kills):
    rows = [whole.tokens(0)[i].tolist() for i in range(whole.shards[0].documents)] * 8
    (tmp_path / "in").mkdir()
    ds(tmp_path / "in" / "a.ds", rows)
    megatron(tmp_path / "in" / "b.bin", rows)
    arguments = ["--tokenizer", tiny_llama, "--unchecked"]
    killing.killed(tmp_path, kills, lambda f: ["import-tokens", f / "out", tmp_path / "in", *arguments])
    assert Corpus(tmp_path / "whole" / "out").manifest["totals"]["documents"] == 2 * len(rows)


def test_two_at_once(tmp_path, raw, whole):
    """The second waits, says so, and finds the corpus; a third with other settings is refused as if it came later."""
    path = written(tmp_path, raw)
    first = killing.fastft(tmp_path, "prepare", path)
    while not (tmp_path / "out" / PROGRESS).is_file():
        assert first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGSTOP)
    second = killing.fastft(tmp_path, "prepare", path, pipe=True)
    third = killing.fastft(tmp_path, "prepare", path, "duplicates=keep", pipe=True)
    for waits in (second, third):
        assert "another process makes this corpus (it holds out.lock): waiting" in waits.stdout.readline()
    os.killpg(first.pid, signal.SIGCONT)
    killing.done(first)
    assert second.wait(60) == 0 and whole.digest in second.stdout.read()
    assert third.wait(60) == 1 and "made from other files or settings" in third.stdout.read()
    assert corpora.content(tmp_path / "out") == corpora.content(whole.folder)
    assert not list(tmp_path.glob("*.lock"))
