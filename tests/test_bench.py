"""`fastft bench`: what it says is what training does, and it leaves nothing behind."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import jobs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import launch
from fastft import config as configuration
from fastft.bench import advice, flops
from fastft.bench.clock import COLLECTIVES, PARTS, Clock


@pytest.fixture
def watched(lm_config, tmp_path) -> Path:
    """A run that evaluates, saves, tracks and can stop early, none of which a benchmark does."""
    lm_config["train"] = {"epochs": 1, "eval_every": 1, "eval_at_start": True, "early_stopping": "eval.loss"}
    lm_config["data"]["eval"] = {"eval": lm_config["data"]["eval"]}
    lm_config["checkpoint"] = {"every": 1}
    lm_config["run"]["trackers"] = ["tensorboard"]
    return launch.write_config(tmp_path / "c.yaml", lm_config)


def test_steps_are_those_of_training_and_nothing_is_left(watched, tmp_path):
    _, output = launch.fastft("bench", watched, "--steps", "5", "--warmup", "2", "--json")
    report = json.loads(output.splitlines()[-1])
    steps = report["step_seconds"]
    assert report["steps"] == 5 and 0 < steps["min"] <= steps["median"] <= steps["max"]
    assert set(report["parts"]) == set(PARTS)
    medians = sum(part["median"] for part in report["parts"].values())
    assert steps["min"] * 0.9 < medians < steps["max"] * 1.1
    assert sum(part["share"] for part in report["parts"].values()) == pytest.approx(1)
    assert all(report["parts"][part]["median"] > 0 for part in ("forward", "backward", "optimizer"))
    assert report["parts"]["communication"]["max"] == 0.0  # one rank
    rate, tokens = report["tokens_per_second"], 6 * 64
    assert tokens * 0.5 / steps["max"] < rate["median"] <= tokens * 1.01 / steps["min"]
    assert 0 < report["flops"]["utilization"] < 1 and 0 < report["of_ceiling"]["model"] < 1.5
    assert report["peak_memory"] > 1e8 and report["start_seconds"] > steps["median"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["prepared"]


def test_the_table_for_people(watched):
    _, output = launch.fastft("bench", watched, "--steps", "3", "--warmup", "1")
    for expected in ("share", "forward", "tokens/s: ", "model FLOP/s utilization: ", "peak memory", "advice: "):
        assert expected in output
    assert all(part in output for part in PARTS)


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.long)])
def test_what_waits_for_other_ranks_is_told_apart(watched, zero):
    command = ["-m", "fastft", "bench", watched, "--steps", "4", "--warmup", "1", "--json", f"parallel.zero={zero}"]
    output = launch.ranks(2, command)[0]
    report = json.loads(output.splitlines()[-1])
    assert report["machine"]["ranks"] == 2 and report["ceilings"]["all_reduce_bytes_per_second"] > 0
    assert report["parts"]["communication"]["min"] > 0


def test_sigterm_leaves_nothing_behind(watched):
    process = launch.start_python(["-m", "fastft", "bench", watched, "--steps", "100000"], {})
    deadline, folder = time.monotonic() + 60, None
    while folder is None and time.monotonic() < deadline:
        time.sleep(0.05)
        for file in Path(f"/proc/{process.pid}/fd").glob("*"):
            with suppress(OSError):
                if "/fastft-bench-" in (target := os.readlink(file)):
                    folder = Path(target).parent
    process.send_signal(signal.SIGTERM)
    launch.finish(process, 60)
    assert process.returncode == 143 and folder is not None and not folder.exists()


def test_too_few_steps(watched):
    code, output = launch.fastft("bench", watched, "--steps", "1", check=False)
    assert code == 1
    assert "1 counted" in output and "At least 1 and 3" in output


def test_collectives_are_put_back_and_work_under_way_is_timed(monkeypatch):
    class Work:
        def wait(self):
            return "done"

        def is_completed(self):
            return True

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, async_op=False: Work() if async_op else None)
    before = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
    clock = Clock(torch.device("cpu"))
    with clock.collectives():
        assert torch.distributed.all_reduce(torch.ones(1)) is None
        work = torch.distributed.all_reduce(torch.ones(1), async_op=True)
        first = clock.waited
        assert work.is_completed() and work.wait() == "done" and clock.waited > first > 0
    clock.mark("backward")
    clock.end()
    assert clock.steps[0]["communication"] > 0 and set(clock.steps[0]) == set(PARTS)
    assert {name: getattr(torch.distributed, name) for name in COLLECTIVES} == before


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_flops_are_those_that_torch_counts(lm_config, classification_config, task):
    """Of one token, whose attention takes 4 FLOP a hidden unit and layer more."""
    model = jobs.job_of(lm_config if task == "causal_lm" else classification_config).model
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * width * config.num_attention_heads * config.num_hidden_layers
    found = flops.work(model)
    assert found.forward in (counter.get_total_flops(), counter.get_total_flops() - attention)
    assert found.backward == 2 * found.forward
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.get_input_embeddings().weight.requires_grad = True
    tied = getattr(config, "tie_word_embeddings", False) and task == "causal_lm"
    assert found.forward <= flops.work(model).backward <= found.forward * (2 if tied else 1)


def test_experts_count_as_far_as_a_token_goes_to_them():
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    model = transformers.MixtralForCausalLM(config)
    experts = 3 * 16 * 24
    whole = 4 * 16 * 16 + 16 * 4 + 32 * 16 + experts
    assert flops.work(model).forward == 2 * whole


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"data": 0.3}, "waits for batches"),
        ({"padding": 0.4}, "length_groups"),
        ({"communication": 0.5}, "lower parallel.zero"),
        ({"optimizer": 0.4}, "larger batch updates less often"),
        ({"other": 0.2}, "train.log_every"),
        ({}, "No setting stands out"),
        ({"device": "NVIDIA H100", "host": 1.0}, "the GPU waits"),
    ],
)
def test_advice(lm_config, changes, part, monkeypatch):
    monkeypatch.setattr(advice, "cpu_multiplies_bf16", lambda: False)
    config = configuration.validate({**lm_config, "parallel": {"zero": 3}})
    report = {
        "parts": {name: {"share": changes.get(name, 0.0)} for name in PARTS},
        "padding": changes.get("padding", 0.0),
        "machine": {"device": changes.get("device", "CPU x")},
        "host_seconds": changes.get("host", 0.1),
        "flops": {"utilization": 0.5},
    }
    assert part in advice.advice(report, config, 1.0)
