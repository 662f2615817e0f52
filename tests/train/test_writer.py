"""The thread that writes checkpoints: files that hold the state, errors that reach the training,
and a sign of life only while the disk answers.
"""

import errno
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastft import config as configuration
from fastft.files import sha256_file
from fastft.ranks import Ranks
from fastft.train import writer
from fastft.train.saver import Saver
from fastft.train.writer import Writer
from fastft.zero import state_files

CONFIG = {"task": "causal_lm", "model": {"path": "x"}}
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
STATE = {
    "w": torch.arange(3_000_000, dtype=torch.float32),
    "empty": torch.zeros(0),
    "view": torch.arange(10)[2:5],
    "n": 3,
    **{f"s{i}": torch.full((8,), i) for i in range(300)},
}


def written(folder, state, name="x.safetensors") -> tuple[Writer, dict]:
    """What a writer makes of a state, and the manifest's entries."""
    entries: dict = {}
    found = Writer(ALONE)
    found.write({folder / name: state}, folder, entries.update)
    found.wait()
    return found, entries


def test_a_file_holds_the_state(tmp_path, monkeypatch):
    """In parts of any size; its size and hash, taken on the way, are those of the file."""
    for part, sync in ((1 << 20, 256 << 20), (1000, 5000)):
        monkeypatch.setattr(writer, "PART", part)
        monkeypatch.setattr(writer, "SYNC", sync)
        found, entries = written(tmp_path, STATE)
        assert not found.problem and found.moved > 12_000_000 // part
        path = tmp_path / "x.safetensors"
        assert entries[path.name] == {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        again = state_files.read(path)
        assert again.keys() == STATE.keys()
        assert all(torch.equal(again[k], v) if torch.is_tensor(v) else again[k] == v for k, v in STATE.items())
        assert path.stat().st_size < sum(v.nbytes for v in STATE.values() if torch.is_tensor(v)) + 120 * len(STATE)
        path.unlink()


@pytest.mark.parametrize("call", ["write", "fdatasync", "fsync"])
def test_an_error_of_the_disk_reaches_the_training(tmp_path, monkeypatch, call):
    """Also in the middle of a file."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    if call == "write":

        class Full(writer._Stream):
            def _write(self, part):
                if self.bytes > 100_000:
                    fail()
                super()._write(part)

        monkeypatch.setattr(writer, "_Stream", Full)
        monkeypatch.setattr(writer, "PART", 50_000)
    else:
        monkeypatch.setattr(writer, "SYNC", 1000)
        monkeypatch.setattr(os, call, fail)
    found, entries = written(tmp_path, STATE)
    assert "x.safetensors: writing the checkpoint failed: [Errno 5] Input/output error" in found.problem and not entries


@pytest.mark.parametrize("answers", [True, False])
def test_a_sign_of_life_only_while_the_disk_answers(tmp_path, monkeypatch, answers):
    """A pipe that is read slowly, or by nobody for two seconds, plays the disk."""
    monkeypatch.setattr(writer, "PART", 50_000)
    os.mkfifo(tmp_path / "x.safetensors")
    found, beats, turns = Writer(ALONE), [], []
    heart = SimpleNamespace(beat=lambda step: beats.append(time.monotonic() - start))
    split = SimpleNamespace(data=SimpleNamespace(key="", meta={}))
    job = SimpleNamespace(
        train=split, config=configuration.validate(CONFIG), ranks=ALONE, learned={}, adapter_only=False
    )
    saver = Saver(job, None, None, "", None, heart)
    saver.writer, saver.agreed = found, lambda: turns.append(time.monotonic() - start)

    def read() -> None:
        if not answers:
            time.sleep(2.0)
        with open(tmp_path / "x.safetensors", "rb") as f:
            while f.read(100_000):
                time.sleep(0.02 if answers else 0.0)

    start = time.monotonic()
    threading.Thread(target=read, daemon=True).start()
    found.write({tmp_path / "x.safetensors": STATE}, tmp_path, lambda entries: None)
    saver.settle(7)
    assert sum(0.3 < at < 1.7 for at in turns) > 20
    assert any(0.3 < at < 1.7 for at in beats) is answers


def test_waiting_is_no_sign_of_life():
    """A rank that waits for the others' files beats only while some rank's write gets on."""
    beats = []
    rounds = iter([(1, 5), (1, 5), (1, 9), (1, 9), (1, 9), (0, 9)])  # ranks that write, and what all have written
    writer = SimpleNamespace(busy=lambda: True, moved=0, problem="")
    ranks = SimpleNamespace(sum=lambda _: next(rounds), max=lambda values: values)
    saver = SimpleNamespace(
        writer=writer,
        heart=SimpleNamespace(beat=beats.append),
        job=SimpleNamespace(ranks=ranks),
        agreed=lambda: 0,
    )
    Saver.settle(saver, 7)
    assert beats == [7, 7]
