"""train.eval_every and checkpoint.every in steps, epochs and seconds: where they fall; ranks and resumes agree."""

import shutil
from types import SimpleNamespace

import pytest

import launch
from fastft import config as configuration
from fastft import track
from fastft.data.orders.base import Samples
from fastft.errors import UserError
from fastft.train import checkpoint
from fastft.train.schedule import Due, Schedule


def schedule(rows: int, size: int, total: int = 10**6, segments=()) -> Schedule:
    order = SimpleNamespace(split=range(rows), samples=Samples, rows_per_epoch=rows)
    return Schedule(order, size, total, total * size, segments)


def steps(every, plan: Schedule, last: int) -> list[int]:
    due = Due(every, plan, 0.0)
    return [step for step in range(1, last + 1) if due.at(step, 0.0)]


@pytest.mark.parametrize(
    "every, rows, size, last, expected",
    [
        (3, 10, 4, 10, [3, 6, 9]),
        (None, 10, 4, 10, []),
        ("epoch", 48, 8, 18, [6, 12, 18]),
        ("epoch", 10, 4, 10, [3, 5, 8, 10]),  # 10 rows end within steps 3 and 8
        ("0.5 epochs", 10, 4, 5, [2, 3, 4, 5]),
        ("0.1 epochs", 10, 4, 3, [1, 2, 3]),  # more often than there are steps: every step, once
        ("2 epochs", 10, 4, 10, [5, 10]),
        ("0.1 epochs", 30, 1, 30, [3 * i for i in range(1, 11)]),  # no step is lost to rounding
    ],
)
def test_steps_and_epochs(every, rows, size, last, expected):
    assert steps(every, schedule(rows, size), last) == expected


def test_epochs_after_a_short_last_step():
    """One epoch of 10 rows ended with a step of 2; the next epochs begin behind it."""
    assert steps("epoch", schedule(10, 4, segments=((3, 10),)), 9) == [3, 6, 8]


def test_seconds_count_from_the_last_time():
    due = Due("90s", schedule(10, 4), 100.0)
    assert due.by_time and not due.at(1, 189.9) and due.at(2, 190.0)
    due.done(195.0)
    assert not due.at(3, 284.9) and due.at(3, 285.0)


@pytest.mark.parametrize("every", ["0s", "0 epochs", "5 parsecs", "", 0, -1, True, 1.5])
def test_what_is_no_interval_is_refused(every):
    with pytest.raises(UserError, match=r"train.eval_every"):
        configuration.validate({"task": "causal_lm", "model": {"path": "m"}, "train": {"eval_every": every}})


def at(run, kind: str) -> list[int]:
    return [r["step"] for r in track.read(run) if r["kind"] == kind]


def test_epochs_of_a_run_and_of_its_resumed_rest(classification_config, tmp_path):
    """48 rows, 7 a step: the seventh is short; evaluations and checkpoints fall where they fall in the whole run."""
    classification_config["batch"]["size"] = 7
    classification_config["train"] = {"epochs": 2, "log_every": 1, "eval_every": "0.5 epochs"}
    classification_config["checkpoint"] = {"every": "epoch", "keep": 9}
    classification_config["run"]["dir"] = str(tmp_path / "whole")
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", classification_config))
    whole = tmp_path / "whole"
    assert at(whole, "eval") == [4, 7, 11, 14] and checkpoint.steps(whole / "checkpoints") == [7, 14]
    shutil.copytree(whole, tmp_path / "rest", ignore=shutil.ignore_patterns("step-14", "model", "metrics.jsonl"))
    launch.fastft("resume", tmp_path / "rest")
    assert at(tmp_path / "rest", "eval") == [11, 14] and checkpoint.steps(tmp_path / "rest/checkpoints") == [7, 14]


def test_two_ranks_agree_on_the_time(classification_config, tmp_path):
    """By rank 0's clock: an evaluation that one rank begins alone would hang."""
    classification_config["train"] = {"steps": 40, "log_every": 10, "eval_every": "0.1s"}
    classification_config["checkpoint"] = {"every": "0.15s", "keep": 99}
    launch.ranks(2, ["-m", "fastft", "train", launch.write_config(tmp_path / "c.yaml", classification_config)])
    run = tmp_path / "run"
    evaluated = at(run, "eval")
    assert evaluated[-1] == 40 and 2 <= len(evaluated) < 40 and evaluated == sorted(set(evaluated))
    assert 2 <= len(checkpoint.steps(run / "checkpoints")) < 40
