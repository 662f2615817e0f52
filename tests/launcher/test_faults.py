"""Real faults into real ranks: the fault matrix with one try of each kind; what is near to another is long.

``benchmarks/faults.py`` is the same over all stages and all moments, and writes the table.
"""

import functools
import os
import sys

import pytest

import launch

sys.path.insert(0, str(launch.ROOT / "benchmarks"))
import faults
from launched import EVERY, WATCHDOG, Bench

# (ZeRO stage, dtype) that each fault is tried at here
SHARDED = ("rank killed", "launcher killed", "killed while it loads", "killed in the export", "weight file: cut short")
WHERE = dict.fromkeys(SHARDED, (3, "bf16"))
SEEN = {"rank killed": 5.0, "rank stopped": WATCHDOG + 5.0, "launcher killed": 10.0, "SIGTERM in a collective": 30.0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"), popen=functools.partial(launch.start_python, pipe=True))


MOMENTS = ("begin", "after-file", "before-rename", "before-latest")
ELSEWHERE = (
    "checkpoint file: cut short",
    "checkpoint file: missing",
    "ranks differ: seed",
    "ranks differ: learning rate",
)  # tests/train/test_resume.py, test_health.py
LONG = (
    "disk read-only",
    "disk hangs",
    "NaN on one rank for good",
    "killed while it loads",
    "weight file: missing",
    "out of memory on one rank",
    *(f"killed in a save: {moment}" for moment in MOMENTS if moment != "before-rename"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in LONG else [])
        for name in faults.FAULTS
        if name not in ELSEWHERE and (not name.startswith("killed in a save") or name.endswith(MOMENTS))
    ],
)
def test_nothing_is_lost(bench, name):
    if name.startswith("disk") and os.geteuid():
        pytest.skip("mounting a disk of a test's own needs root")
    zero, dtype = WHERE.get(name, (1, "fp32"))
    outcome = faults.FAULTS[name](bench, zero, dtype)
    assert outcome.survived, outcome
    assert outcome.seen is None or outcome.seen <= SEEN.get(name, 60.0), outcome
    assert outcome.lost <= (20 if name == "slow rank" else 2 * EVERY), outcome
