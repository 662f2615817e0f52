"""Adam with L2 and SGD are torch's, whatever the ZeRO stage, the ranks and the micro-steps; runs of theirs resume."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from train.test_equivalence import variant
from train.test_resume import curve, same_checkpoints

import launch
from fastft import config as configuration
from fastft import track
from fastft.data import order
from fastft.errors import UserError
from fastft.optim.schedules import learning_rate
from fastft.tasks.base import TASKS, Draw

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
STEPS, SAVED = 10, 5
SETTINGS = {
    "adam": {"lr": 1e-3, "betas": [0.8, 0.99]},
    "sgd": {"lr": 0.2, "momentum": 0.9, "nesterov": True},
    "sgd_dampened": {"lr": 0.5, "momentum": 0.8, "dampening": 0.3},
    "sgd_plain": {"lr": 0.5},
}
STAGES = {"adam": (0, 1, 2, 3), "sgd": (0, 1, 2, 3), "sgd_dampened": (3,), "sgd_plain": (2,)}
RESUMED = {"adam": 1, "sgd": 3}
MICRO = {0: 1, 1: 2, 2: "auto", 3: 1}


def reference(config: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The run in plain torch: one process, whole batches, torch's optimizer, torch's clipping."""
    torch.set_num_threads(1)
    c = configuration.validate(config)
    task = TASKS.get(c.task)(c)
    split = task.train_split()
    model = transformers.AutoModelForCausalLM.from_pretrained(c.model.path)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.Adam if c.optim.name == "adam" else torch.optim.SGD
    shared = {name: getattr(c.optim, name) for name in ("betas", "eps", "momentum", "dampening", "nesterov")
              if hasattr(c.optim, name)}  # fmt: skip
    optimizer = kind(groups, lr=c.optim.lr, **shared)
    losses = []
    for step in range(c.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(c.optim, step, c.train.steps)
        ids = order.sample_ids(len(split), c.data.seed, step * c.batch.size, (step + 1) * c.batch.size)
        batch = task.collate(split, ids, Draw.fixed(0, c.batch.size))
        loss = F.cross_entropy(model(**batch.inputs).logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model.state_dict()


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus, tiny_llama) -> dict:
    """A language model without dropout; 7 rows a step, which do not divide by anything."""
    folder = tmp_path_factory.mktemp("no_dropout")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.attention_dropout = 0.0
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return {
        "task": "causal_lm",
        "model": {"path": str(folder)},
        "data": {
            "train": str(corpus / "train.jsonl"),
            "max_length": 32,
            "truncation": "truncate",
            "packing": "none",
            "cache": str(folder / "prepared"),
        },
        "batch": {"size": 7},
        "train": {"steps": STEPS, "log_every": 1},
        "run": {"offline": True, "device": "cpu", "threads": 1},
    }


def config_of(base: dict, tmp_path, name: str, zero: int = 0, **changes) -> dict:
    optim = {"name": name.split("_")[0], "warmup": 2, "weight_decay": 0.1, "grad_clip": 0.5, **SETTINGS[name]}
    return variant(
        {**base, "optim": optim}, tmp_path, f"{name}{zero}", parallel__zero=zero, batch__micro=MICRO[zero], **changes
    )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Every optimizer at every stage on 2 ranks, in one process group."""
    folder = tmp_path_factory.mktemp("optimizers")
    runs = {}
    for name in SETTINGS:
        for zero in STAGES[name]:
            config = config_of(base, folder, name, zero, checkpoint__every=SAVED, checkpoint__keep=9)
            runs[name, zero] = launch.write_config(folder / f"{name}{zero}.yaml", config)
    launch.ranks(2, [RUNS, "train", *runs.values()])
    return folder, list(runs)


def test_zero_stages_on_two_ranks_equal_torch(base, trained):
    """With clipping, decay groups, a schedule, and another number of micro-steps at each stage."""
    folder, runs = trained
    expected = {name: reference(config_of(base, folder, name)) for name in SETTINGS}
    for name, zero in runs:
        losses, weights = expected[name]
        run = folder / f"{name}{zero}"
        assert losses[-1] < losses[0] - 0.05, name
        assert np.allclose([c[1] for c in curve(run)], losses, rtol=2e-6, atol=0), (name, zero)
        found = transformers.AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
        assert max((found[n] - w).abs().max().item() for n, w in weights.items()) < 2e-6, (name, zero)
        said = next(r["zero_step"] for r in track.read(run) if r["kind"] == "run")
        assert (said == "fused") == (name == "adam" and zero > 0), said


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bit_exact(trained, tmp_path, name):
    folder, _ = trained
    whole, resumed = folder / f"{name}{RESUMED[name]}", tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(f"step-{STEPS}", "model", "metrics.jsonl"))
    launch.ranks(2, ["-m", "fastft", "resume", resumed])
    same_checkpoints(*(run / "checkpoints" / f"step-{STEPS}" for run in (whole, resumed)))
    assert curve(resumed) == curve(whole)[SAVED:]


def test_another_number_of_ranks(trained, tmp_path):
    """What every optimizer keeps is cut anew."""
    folder, _ = trained
    for name, zero in RESUMED.items():
        ignored = shutil.ignore_patterns(f"step-{STEPS}", "model", "metrics.jsonl")
        shutil.copytree(folder / f"{name}{zero}", tmp_path / name, ignore=ignored)
        launch.fastft("resume", tmp_path / name)
        losses, truth = ([c[1] for c in curve(run)] for run in (tmp_path / name, folder / f"{name}{zero}"))
        assert np.allclose(losses, truth[SAVED:], rtol=2e-6, atol=0) and len(losses) == STEPS - SAVED


def test_bf16_at_stage_0_takes_no_step_of_its_own(base, tmp_path):
    """DeepSpeed steps once on gradients of zero while it is built: weights would decay, Adam would count it."""
    settings = {"train__steps": 1, "optim__weight_decay": 0.5, "optim__warmup": 0, "optim__grad_clip": 1e-6}
    for name, lr in (("adam", 1e-2), ("sgd_plain", 0.1)):
        config = config_of(base, tmp_path, name, optim__lr=lr, **settings)
        config["model"]["dtype"] = "bf16"
        launch.fastft("train", launch.write_config(tmp_path / f"{name}.yaml", config))
        before = load_file(f"{base['model']['path']}/model.safetensors")
        after = load_file(tmp_path / f"{name}0" / "model" / "model.safetensors")
        for key, tensor in before.items():
            change = after[key].float() - tensor
            if name == "adam":  # the first step of Adam is as long as lr
                assert change.abs().max() <= 1.05 * lr + 2**-8 * tensor.abs().max(), key
            elif tensor.dim() >= 2:  # 1 - lr * weight_decay, once
                assert torch.allclose(after[key].float(), 0.95 * tensor, rtol=1e-2, atol=1e-4), key


@pytest.mark.parametrize(
    "optim, part",
    [
        ({"name": "sgd", "betas": [0.9, 0.99]}, "optim.betas: unknown key"),
        ({"name": "adam", "momentum": 0.9}, "optim.momentum: unknown key"),
        ({"name": "sgd", "nesterov": True}, "optim.nesterov needs optim.momentum"),
        ({"name": "sgd", "dampening": 0.5}, "optim.dampening is of the momentum"),
        ({"name": "sdg"}, "Did you mean 'sgd'"),
    ],
)
def test_settings_of_another_optimizer_are_refused(optim, part):
    with pytest.raises(UserError, match=part):
        configuration.validate({"task": "causal_lm", "model": {"path": "m"}, "optim": optim})
