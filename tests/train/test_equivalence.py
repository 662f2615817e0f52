"""However a step is cut into micro-steps, ranks and shards, it is the step of one big batch, and torch's AdamW."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import launch
from fastft import config as configuration
from fastft import track
from fastft.data import order
from fastft.optim.schedules import learning_rate
from fastft.tasks.base import TASKS, Draw

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
CUTS = [(micro, zero) for micro in (1, 2, 6) for zero in (0,)] + [(1, 1), (1, 2), (1, 3), ("auto", 0)]


def variant(base: dict, tmp_path, name: str, **changes) -> dict:
    config = copy.deepcopy(base)
    config["run"]["dir"] = str(tmp_path / name)
    config["data"]["cache"] = str(tmp_path / "prepared")
    for key, value in changes.items():
        section, field = key.split("__")
        config.setdefault(section, {})[field] = value
    return config


@pytest.fixture
def uneven(lm_config) -> dict:
    """Documents in rows of their own: target counts differ from row to row, and 7 rows do not divide by anything."""
    lm_config["data"] |= {"packing": "none", "truncation": "truncate"}
    lm_config["batch"]["size"] = 7
    return lm_config


def big_batch(config: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of step 0 as one batch in plain torch."""
    c = configuration.validate(config)
    task = TASKS.get(c.task)(c)
    split = task.train_split()
    model = transformers.AutoModelForCausalLM.from_pretrained(c.model.path).eval()
    batch = task.collate(split, order.sample_ids(len(split), c.data.seed, 0, c.batch.size), Draw.fixed(0, c.batch.size))
    logits = model(**batch.inputs).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 2])
def test_micro_steps_times_ranks_equal_one_big_batch(uneven, tmp_path, world):
    loss, grads = big_batch(variant(uneven, tmp_path, "big"))
    names = []
    for micro, zero in CUTS:
        name = f"m{micro}z{zero}"
        names.append(
            (
                name,
                launch.write_config(
                    tmp_path / f"{name}.yaml", variant(uneven, tmp_path, name, batch__micro=micro, parallel__zero=zero)
                ),
            )
        )
    launch.ranks(world, [RUNS, "gradients", tmp_path, *[path for _, path in names]])
    for name, _ in names:
        found = torch.load(tmp_path / f"{name}.pt")
        assert abs(float(found["loss"]) - loss) < 1e-6 * loss, name
        assert set(found["grads"]) == set(grads)
        for parameter, expected in grads.items():
            assert torch.allclose(found["grads"][parameter], expected, rtol=0, atol=1e-6), (name, parameter)


def torch_adamw(config: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same run in plain torch: one process, whole batches, torch.optim.AdamW, torch's clipping."""
    c = configuration.validate(config)
    task = TASKS.get(c.task)(c)
    split = task.train_split()
    model = transformers.AutoModelForCausalLM.from_pretrained(c.model.path)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.optim.lr, betas=c.optim.betas, eps=c.optim.eps)
    losses = []
    for step in range(c.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(c.optim, step, c.train.steps)
        batch = task.collate(
            split,
            order.sample_ids(len(split), c.data.seed, step * c.batch.size, (step + 1) * c.batch.size),
            Draw.fixed(0, c.batch.size),
        )
        loss = F.cross_entropy(model(**batch.inputs).logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model.state_dict()


def test_zero_stages_on_two_ranks_equal_torch_adamw(uneven, tmp_path, tiny_llama):
    """20 steps with clipping, decay groups and a schedule; ZeRO 0-3 on 2 ranks, and one rank with micro: auto."""
    folder = tmp_path / "no_dropout"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.attention_dropout = 0.0
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    uneven["model"]["path"] = str(folder)
    uneven["train"]["steps"] = 20
    uneven["optim"]["grad_clip"] = 0.5  # bites at every step of this model
    losses, weights = torch_adamw(variant(uneven, tmp_path, "torch"))
    runs = {
        f"zero{z}": launch.write_config(
            tmp_path / f"zero{z}.yaml", variant(uneven, tmp_path, f"zero{z}", parallel__zero=z)
        )
        for z in range(4)
    }
    launch.ranks(2, [RUNS, "train", *runs.values()])
    single = launch.write_config(tmp_path / "single.yaml", variant(uneven, tmp_path, "single"))
    launch.fastft("train", single)
    for name in [*runs, "single"]:
        curve = [r["loss"] for r in track.read(tmp_path / name) if r["kind"] == "train"]
        assert np.allclose(curve, losses, rtol=2e-6, atol=0), name
        trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        assert max((trained[n] - w).abs().max().item() for n, w in weights.items()) < 2e-6, name


def test_labels_of_a_classifier_are_averaged_over_the_global_batch(classification_config, tmp_path):
    """9 rows over 2 ranks and micro-steps of 2: the loss is the mean over the 9."""
    classification_config["batch"]["size"] = 9
    classification_config["train"]["steps"] = 3
    one = launch.write_config(tmp_path / "one.yaml", variant(classification_config, tmp_path, "one", batch__micro=9))
    two = launch.write_config(tmp_path / "two.yaml", variant(classification_config, tmp_path, "two", batch__micro=2))
    launch.fastft("train", one)
    launch.ranks(2, [RUNS, "train", two])
    curves = [[r["loss"] for r in track.read(tmp_path / name) if r["kind"] == "train"] for name in ("one", "two")]
    assert np.allclose(*curves, rtol=2e-6, atol=0)
