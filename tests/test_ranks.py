"""Where a process stands, by what launchers leave in its environment."""

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

import launch
from fastft import config as configuration
from fastft import ranks
from fastft.errors import UserError
from fastft.launch import protocol

ALL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def place(monkeypatch, lm_config):
    """Ranks in an environment of these variables alone, and what the environment became."""

    def found(**variables: str):
        for name in {*os.environ} - protocol.without_others(os.environ).keys():
            monkeypatch.delenv(name)
        for names in ranks.STARTERS.values():
            for name in names:
                monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return ranks.environment(configuration.validate(lm_config))

    return found


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "LOCAL_WORLD_SIZE": "2"},  # the rest of another job
        {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "3"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
    ],
)
def test_alone(place, variables):
    found = place(**variables)
    assert (found.rank, found.world, found.local_world) == (0, 1, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RANK": "0"}, "RANK is set in the environment, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK are not"),
        ({**ALL, "RANK": "2"}, "RANK=2 is not one of the 2 ranks of WORLD_SIZE=2"),
        ({**ALL, "WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is no number"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "process 0 of 2 that Open MPI started"),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, "process 3 of 4 that MPI started"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "process 1 of 4 that srun started"),
    ],
)
def test_half_of_a_place_is_refused(place, variables, part):
    with pytest.raises(UserError) as e:
        place(**variables)
    assert part in str(e.value)


def test_ranks_of_mpi_are_taken_where_they_can_meet(place):
    meet = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    mpi |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    found = place(**mpi, **meet)
    assert (found.rank, found.world, found.local_rank, found.local_world) == (3, 4, 1, 2)


def test_a_rank_says_whom_it_waits_for(lm_config, tmp_path):
    """The variables of a job of two ranks, left in a shell."""
    lm_config["run"]["dir"] = str(tmp_path / "run")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(lm_config))
    code = "from fastft.zero import engine; engine.WAITED = 0.5; from fastft.cli.main import command; command()"
    env = {**ALL, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.free_port())}
    process = launch.start([launch.sys.executable, "-c", code, "train", str(tmp_path / "c.yaml")], env)
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if "for the others of 2 ranks at 127.0.0.1:" in line and "WORLD_SIZE" in line:
                break
        else:
            raise AssertionError("".join(said))
    finally:
        launch.kill_group(process)
        process.wait()


ON_CPU_BESIDE_A_GPU = """
import os
import sys
import sys
from unittest import mock

import torch

os.environ.pop("DS_ACCELERATOR", None)
with mock.patch("torch.cuda.is_available", lambda: True), mock.patch("torch.cuda.device_count", lambda: 1):
    import fastft.train.loop  # it imports DeepSpeed, which looks for an accelerator now and never again

    from deepspeed.accelerator import get_accelerator

    assert get_accelerator().device_name() == "cuda"
from fastft import config as configuration

fastft.train.loop.train(configuration.load(sys.argv[1]))
assert get_accelerator().device_name() == "cpu"
print("trained")
"""


def test_on_the_cpu_of_a_machine_with_a_gpu(tmp_path, lm_config):
    """run.device: cpu holds for DeepSpeed's engine too, which chose the GPU before it could know."""
    config = launch.write_config(tmp_path / "config.yaml", {**lm_config, "train": {"steps": 1}})
    process = launch.start_python(["-c", ON_CPU_BESIDE_A_GPU, config], {})
    output = launch.finish(process, 120)
    assert process.returncode == 0 and "trained" in output, output[-4000:]


def test_rank_0_may_work_longer_than_a_collective_waits(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import datetime, os, sys, time, torch, torch.distributed as dist\n"
        "from fastft.ranks import Ranks\n"
        "from fastft.errors import UserError\n"
        "dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=2))\n"
        "rank, local = int(os.environ['RANK']), torch.device('cpu')\n"
        "place = Ranks(rank, 2, rank, 2, local)\n"
        "for _ in range(2):\n"
        "    with place.main_alone():\n"
        "        if place.main:\n"
        "            time.sleep(4)\n"
        "print('sum', place.sum([1.0]))\n"
        "for error in (UserError('no room', 'make some'), KeyError('key')):\n"
        "    try:\n"
        "        with place.main_alone():\n"
        "            if place.main:\n"
        "                raise error\n"
        "    except Exception as e:\n"
        "        print('raised', repr(e))\n"
        "print('sum', place.sum([2.0]))\n"
    )
    first, second = launch.ranks(2, [script])
    assert all("sum [2.0]" in output and "sum [4.0]" in output for output in (first, second))
    for said in (first, second):
        assert "UserError('no room\\nmake some')" in said
    assert "raised KeyError('key')" in first and "raised RuntimeError(\"rank 0: KeyError: 'key'\")" in second


@pytest.mark.long
def test_rounding_and_export_may_take_longer_than_a_collective_waits(lm_config, tmp_path):
    lm_config["model"] |= {"lora": {"r": 4}, "quantize": {"format": "nf4", "calibrate": 2}}
    script = tmp_path / "script.py"
    script.write_text(
        "import datetime, functools, sys, time, deepspeed, fastft\n"
        "from fastft.models.edits import _rounding\n"
        "from fastft.train import export\n"
        "limit = datetime.timedelta(seconds=15)\n"
        "deepspeed.init_distributed = functools.partial(deepspeed.init_distributed, timeout=limit)\n"
        "slowly = lambda work: lambda *given: (time.sleep(20), work(*given))[1]\n"
        "_rounding.by_rows, export.save = slowly(_rounding.by_rows), slowly(export.save)\n"
        "print('step', fastft.fit(sys.argv[1]).summary.step)\n"
    )
    outputs = launch.ranks(2, [script, launch.write_config(tmp_path / "c.yaml", lm_config)])
    assert all(f"step {lm_config['train']['steps']}" in output for output in outputs)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_what_loading_left_is_given_back_before_the_heap_is_kept():
    """Arrays that others lie between: the heap cannot shrink by them."""

    def own() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) << 10

    arrays = [torch.ones(25_000) for _ in range(1_000)]  # of 100 kB, below glibc's limit for pages of their own
    left = arrays[::2]
    del arrays
    before = own()
    ranks.keep_heap(torch.device("cpu"), False)
    assert own() < before - 30_000_000
    assert all(array.sum() == 25_000 for array in left)
