"""What ranks check of each other, on real ranks with the real fault."""

import json
import os
import shlex
import sys

import pytest

import launch

RANKS = """
import os, sys, time, torch, torch.distributed as dist
from fastft import config as configuration
from fastft.cli import leave
from fastft.errors import UserError
from fastft.train import health
from fastft.ranks import Ranks
from fastft.zero import engine

dist.init_process_group("gloo")
config = configuration.validate({"task": "causal_lm", "model": {"path": "x"}})
ranks = Ranks(dist.get_rank(), 3, dist.get_rank(), 3, torch.device("cpu"))

health.check_agreement(config, "data", ranks)
changed = configuration.validate({"task": "causal_lm", "model": {"path": "x"}, "run": {"seed": 18}})
other = changed if ranks.rank == 1 else config
for given, key, parts in (
    (other, "data", ("rank 1", "seed 18", "rank 0 has 17")),
    (config, f"data{ranks.rank == 2}", ("rank 2 has data",)),
):
    try:
        health.check_agreement(given, key, ranks)
        raise SystemExit("ranks that differ went through")
    except UserError as e:
        assert all(part in str(e) for part in parts), e

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    net = torch.nn.Linear(9, 7).to(dtype)
    health.check_weights(net, ranks, 5)
    if ranks.rank == 2:  # one bit of one weight
        net.weight.data.view({4: torch.int32, 2: torch.int16}[net.weight.element_size()])[3, 4] ^= 1
    try:
        health.check_weights(net, ranks, 5)
        raise SystemExit("a flipped bit went through")
    except UserError as e:
        assert "step 5: the weights of rank 2 differ" in str(e)

timer = health.ForwardTimer(ranks.device)
for seconds in ((0.05, 0.05, 0.05), (0.05, 0.15, 0.05)):
    for _ in range(3):
        with timer:
            time.sleep(seconds[ranks.rank])
    slow = timer.slow_ranks(ranks)
    assert list(slow) == ([1] if seconds[1] > 0.1 else []), slow
dist.destroy_process_group()
leave(0)
"""


def test_ranks_that_differ_are_named(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    launch.ranks(3, [tmp_path / "ranks.py"])


def test_a_rank_with_other_settings_is_refused_before_the_first_step(lm_config, tmp_path):
    """Two hosts with two versions of the file: here two ranks, each with its own."""
    lm_config["train"] = {"steps": 1}
    one = launch.write_config(tmp_path / "one.yaml", lm_config)
    two = launch.write_config(tmp_path / "two.yaml", {**lm_config, "optim": {"lr": 0.5}})
    port = str(launch.free_port())
    processes = [
        launch.start_python(
            ["-m", "fastft", "train", path],
            {
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "LOCAL_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for r, path in enumerate((one, two))
    ]
    outputs = [launch.finish(p, 120) for p in processes]
    assert [p.returncode for p in processes] == [1, 1]
    assert all("rank 1 has settings" in o and "Traceback" not in o for o in outputs), outputs
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_trace_names_the_documents_of_a_step(lm_config, classification_config, tmp_path):
    for name, config in (("lm", lm_config), ("cls", classification_config)):
        path = launch.write_config(tmp_path / f"{name}.yaml", config)
        _, output = launch.fastft("trace", path, "--step", "2", "--json")
        samples = json.loads(output.splitlines()[-1])
        assert samples and all(s["documents"] for s in samples)
        where, _, line = samples[0]["documents"][0].partition(" tokens")[0].rpartition(":")
        assert (launch.Path(where)).is_file() and int(line) >= 1
    code, output = launch.fastft("trace", path, "--step", "99", check=False)
    assert code == 1 and "the run has steps 1 to 4" in output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk of a test's own needs root")
def test_a_run_folder_that_is_not_shared_is_found_before_training(lm_config, tmp_path):
    """Rank 1 sees another disk there."""
    shared = tmp_path / "shared"
    shared.mkdir()
    lm_config["run"]["dir"] = str(shared / "run")
    lm_config["data"]["cache"] = str(tmp_path / "prepared")
    path, port = launch.write_config(tmp_path / "c.yaml", lm_config), str(launch.free_port())
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    code = (
        "from fastft.train import health; health.SHARED_SECONDS = 2.0; from fastft.cli.main import command; command()"
    )
    train = [sys.executable, "-c", code, "train", str(path)]
    mounted = f"mount -t tmpfs t {shared} && exec {shlex.join(train)}"
    commands = (train, ["unshare", "-m", "bash", "-c", mounted])
    processes = [launch.start(c, {**place, "RANK": str(r)}) for r, c in enumerate(commands)]
    for rank, process in enumerate(processes):
        output = launch.finish(process, 90)
        assert process.returncode == 1 and "Traceback" not in output, output
        assert "is not the folder that rank 0 writes to for rank 1 on" in output, (rank, output)
    assert not list((shared / "run").glob(".ranks-*")) and not (shared / "run" / "metrics.jsonl").exists()
