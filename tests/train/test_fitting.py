"""batch.micro_tokens: auto."""

import copy

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from train.test_resume import RUNS, curve

import launch
from fastft import config as configuration
from fastft.errors import UserError
from fastft.train.fitting import explained, free_memory, in_room, largest


@given(fixed=st.floats(0, 1.5), row=st.floats(1e-6, 1.5), most=st.integers(1, 5000), hidden=st.floats(0, 1))
def test_nothing_that_does_not_fit_is_tried(fixed, row, most, hidden):
    """Whatever is taken beside the rows, also where a part of it hides what the first rows take."""
    tried = []

    def share(n: int) -> float:
        return max(fixed + row * n, hidden)

    def used(n: int) -> float:
        tried.append(n)
        return share(n)

    found, taken = largest(used, most)
    fits = [n for n in tried if share(n) <= 1]
    assert found == max(fits, default=0) and taken == (share(found) if found else 0)
    assert all(n == 1 for n in tried if n not in fits) and max(tried) <= most
    if 0 < found < most and share(found) < 1:
        # What it was told would be taken by a tenth more, and not by less than one row.
        assert share(found) * max(1.1, (found + 1) / found) > 1 - 1e-9


def test_it_comes_close(tmp_path):
    tried = []

    def used(n: int) -> float:
        tried.append(n)
        return 0.2 + n / 1000

    assert 650 <= largest(used, 10**6)[0] <= 800 and len(tried) < 12


@pytest.mark.parametrize(
    "files, free",
    [
        ({"memory.max": "max", "memory.current": "5", "memory.stat": ""}, 4096 * 1024),
        ({"memory.max": "1000000", "memory.current": "400000", "memory.stat": "inactive_file 100000"}, 700_000),
        ({"memory.max": "1000000", "memory.current": "1400000", "memory.stat": ""}, 0),
        ({}, 4096 * 1024),
    ],
)
def test_the_machine_or_its_control_group(tmp_path, files, free):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    4096 kB\n")
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, text in files.items():
        (group / name).write_text(text)
    assert free_memory(tmp_path) == free


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_run_is_that_with_the_number(lm_config, tmp_path, world):
    """At every ZeRO stage the number goes into the run's config.yaml, and a run with it is the same bit for bit: what
    was tried has changed nothing, and drawn no random number.
    """
    paths, runs = [], {}
    for zero in range(4):
        for given_ in (True, False):
            config = copy.deepcopy(lm_config)
            config["data"]["cache"] = str(tmp_path / "prepared")
            config["train"] = {"steps": 3, "log_every": 1}
            config["batch"] = {"size": 8, **({} if given_ else {"micro_tokens": "auto"})}
            config["parallel"] = {"zero": zero}
            runs[zero, given_] = tmp_path / f"{zero}-{given_}"
            config["run"]["dir"] = str(runs[zero, given_])
            paths.append(launch.write_config(tmp_path / f"{zero}-{given_}.yaml", config))
    launch.ranks(world, [RUNS, "train", *paths])
    for zero in range(4):
        written = yaml.safe_load((runs[zero, False] / "config.yaml").read_text())
        assert written["batch"]["micro_tokens"] == 16384  # all of a step fits, and the default, of evaluations, too
        assert curve(runs[zero, False]) == curve(runs[zero, True]), zero
    code, _ = launch.fastft("train", tmp_path / "0-False.yaml", "--continue")  # knows the run for its own
    assert code == 0


LIMITED = """
import resource, sys
from pathlib import Path
from contextlib import ExitStack
from fastft import config as configuration
from fastft.cli.main import leave
from fastft.errors import UserError
from fastft.train import fitting, loop

with ExitStack() as cleanup:
    run = loop.build(configuration.load(sys.argv[1]), cleanup, steps_only=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (200 << 20), resource.RLIM_INFINITY))
    run.open(loop.Telemetry(Path(sys.argv[2]), main=False))
    try:
        for _ in run.steps():
            pass
    except UserError as e:
        print(e)
    print("done")
leave(0)
"""


def test_out_of_memory_says_what_to_lower(lm_config, tmp_path):
    """A process that may have 200 MB more, and rows that take ten times as much."""
    lm_config["batch"] = {"size": 512, "micro": 512}
    lm_config["data"]["max_length"] = 64
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    (tmp_path / "run.py").write_text(LIMITED)
    process = launch.start_python([tmp_path / "run.py", path, tmp_path], {})
    output = " ".join(launch.finish(process, 120).split())
    assert "step 1: out of memory" in output and "Lower batch.micro (now 512)" in output, output[-2000:]
    assert output.endswith("done")


def test_other_errors_go_through():
    config = configuration.validate({"task": "causal_lm", "model": {"path": "x"}})
    with pytest.raises(RuntimeError, match="something else"), explained(config, 1):
        raise RuntimeError("something else")
    with pytest.raises(UserError, match="check of the model before the first step: out of memory"), explained(config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


@pytest.mark.parametrize("value, said", [(0, "at least 1, or 'auto'"), ("some", "micro_tokens")])
def test_what_is_no_number(value, said):
    with pytest.raises(UserError, match=said):
        configuration.validate({"task": "causal_lm", "model": {"path": "x"}, "batch": {"micro_tokens": value}})


def test_auto_needs_a_cut_that_goes_by_it():
    batch = {"micro": 4, "micro_tokens": "auto"}
    with pytest.raises(UserError, match=r"needs batch\.micro: auto"):
        configuration.validate({"task": "causal_lm", "model": {"path": "x"}, "batch": batch})


def test_what_evaluations_may_take():
    assert [in_room(512, share) for share in (0.5, 0.01, 0.0, -0.1)] == [1024, 16384, 16384, 16384]
