"""Parameter groupings in real runs: which parameter moves at which step, and how far."""

import copy
import shutil

import jobs
import pytest
import torch
import torch.nn.functional as F
import transformers
from train.test_resume import curve, same_checkpoints

import launch
from fastft import assemble
from fastft import config as configuration
from fastft.config import Config
from fastft.data import order
from fastft.errors import UserError
from fastft.models.depth import depths
from fastft.optim.groupings.base import Progress
from fastft.optim.groups import ParameterGroups
from fastft.optim.schedules import learning_rate
from fastft.train import checkpoint

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
STEPS = 5
# bf16 first: a ZeRO-3 run leaves DeepSpeed's torch.nn.functional.linear behind in its process, which rounds otherwise.
UNFREEZE = [(1, "bf16"), *((stage, "fp32") for stage in range(4))]
OPTIM = {"lr": 1e-3, "weight_decay": 0.1, "warmup": 2, "grad_clip": 0.5}


def variant(base: dict, folder, name: str, zero: int = 0, **optim) -> dict:
    config = copy.deepcopy(base)
    config["optim"] = {**OPTIM, **optim}
    config["parallel"] = {"zero": zero}
    config["train"] = {"steps": STEPS, "log_every": 1}
    config["data"]["cache"] = str(folder / "prepared")
    config["run"]["dir"] = str(folder / name)
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_bert) -> dict:
    rows = tmp_path_factory.mktemp("rows") / "train.jsonl"
    rows.write_text(
        "".join(f'{{"text": "{w} number {i}", "label": "{w}"}}\n' for i in range(20) for w in ("ape", "bee"))
    )
    return {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": str(rows), "max_length": 32},
        "batch": {"size": 7},
        "run": {"offline": True, "device": "cpu", "threads": 1},
    }


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """All runs, on 2 ranks in one process group."""
    folder = tmp_path_factory.mktemp("groupings")
    runs = {}
    for zero, dtype in UNFREEZE:
        name = f"unfreeze{zero}{dtype}"
        runs[name] = variant(base, folder, name, zero, gradual_unfreezing=1)
        runs[name]["model"]["dtype"] = dtype
        runs[name]["checkpoint"] = {"every": 1, "keep": 9}
    runs |= {f"decay{zero}": variant(base, folder, f"decay{zero}", zero, layer_decay=0.5) for zero in range(4)}
    paths = [launch.write_config(folder / f"{name}.yaml", config) for name, config in runs.items()]
    launch.ranks(2, [RUNS, "train", *paths])
    return folder


def test_layer_decay_is_a_torch_loop_with_a_group_per_layer(base, trained, tmp_path):
    """Rates 1, 0.5, 0.25, 0.125 from the head down to the embeddings, at ZeRO 0 to 3 on 2 ranks."""
    torch.set_num_threads(1)
    job = jobs.job_of(variant(base, tmp_path, "torch"))
    config, model = job.config, job.model

    def rate(name: str) -> float:
        if "encoder.layer" in name:
            return {"0": 0.25, "1": 0.5}[name.split(".")[3]]
        return 0.125 if "embeddings" in name else 1.0

    groups = [
        {"params": [p], "weight_decay": 0.1 if p.dim() >= 2 else 0.0, "rate": rate(name)}
        for name, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, STEPS) * group["rate"]
        batch = jobs.batch_of(job, order.sample_ids(len(job.train), config.data.seed, step * 7, (step + 1) * 7))
        F.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    for zero in range(4):
        path = trained / f"decay{zero}" / "model"
        found = transformers.AutoModelForSequenceClassification.from_pretrained(path).state_dict()
        assert max((found[n] - w).abs().max().item() for n, w in model.state_dict().items()) < 2e-6, zero


@pytest.mark.parametrize("zero, dtype", UNFREEZE)
def test_layers_move_from_their_step_on_and_not_before(base, trained, tmp_path, zero, dtype):
    """Weight decay or not: the head at step 1, the upper layer at 2, the lower at 3, the embeddings at 4."""
    config = variant(base, tmp_path, "start")
    config["model"]["dtype"] = dtype
    before = jobs.job_of(config).model
    of, state = depths(before).of, {name: p.detach().clone().float() for name, p in before.named_parameters()}
    for step in range(1, STEPS + 1):
        path, manifest, _ = checkpoint.find(trained / f"unfreeze{zero}{dtype}" / "checkpoints", step)
        after = checkpoint.stored(path, manifest).weights()
        moved = {name: not torch.equal(after[name].float(), tensor) for name, tensor in state.items()}
        assert moved == {name: 3 - depth < step for name, depth in of.items()}, step
        state = {name: after[name].float().clone() for name in state}


@pytest.mark.parametrize("zero, dtype", [(1, "bf16"), (3, "fp32")])
def test_resume_amid_the_unfreezing_is_bit_exact(trained, tmp_path, zero, dtype):
    whole, resumed = trained / f"unfreeze{zero}{dtype}", tmp_path / "resumed"
    later = [f"step-{step}" for step in range(3, STEPS + 1)]
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(*later, "model", "metrics.jsonl"))
    launch.ranks(2, ["-m", "fastft", "resume", resumed])
    same_checkpoints(*(run / "checkpoints" / f"step-{STEPS}" for run in (whole, resumed)))
    assert curve(resumed) == curve(whole)[2:]


def groups_of(config: Config, model: torch.nn.Module) -> ParameterGroups:
    return ParameterGroups.of(model, config)


def test_groups_with_and_without_groupings(base, tmp_path, caplog):
    job = jobs.job_of(variant(base, tmp_path, "plain"))
    assert [g["name"] for g in groups_of(job.config, job.model).groups] == ["decay", "no_decay"]
    both = configuration.validate(
        variant(base, tmp_path, "both", layer_decay={"rate": 0.5}, gradual_unfreezing="epoch")
    )
    groups = groups_of(both, job.model)
    assert [g["name"] for g in groups.groups][:2] == ["decay/0/0", "decay/1/1"] and len(groups.groups) == 8
    optimizer = torch.optim.SGD(groups.groups, lr=1.0)
    for epoch, scales in (
        (0.0, (0, 0, 0, 1)),
        (0.99, (0, 0, 0, 1)),
        (1.0, (0, 0, 0.5, 1)),
        (3.5, (0.125, 0.25, 0.5, 1)),
    ):
        lr = groups.set_learning_rates(optimizer, Progress(4, 8, epoch))
        found = {g["name"]: g["lr"] / lr for g in optimizer.param_groups}
        assert tuple(found[f"decay/{depth}/{depth}"] for depth in range(4)) == scales
    short = configuration.validate(variant(base, tmp_path, "short", gradual_unfreezing=4))
    groups = groups_of(short, job.model)
    for step in range(2):
        groups.set_learning_rates(torch.optim.SGD(groups.groups, lr=1.0), Progress(step, STEPS, 0.1 * step))
    assert sum("before the lowest 2 of 4 groups" in record.getMessage() for record in caplog.records) == 1


def test_what_cannot_be_grouped_is_refused(base, tmp_path):
    small = {"vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "embedding_size": 4}
    albert = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**small))
    for key in ("layer_decay", "gradual_unfreezing"):
        config = configuration.validate(variant(base, tmp_path, "a", **{key: 0.9 if key == "layer_decay" else 1}))
        job = assemble.start(config)
        job.model = albert
        with pytest.raises(UserError, match="runs 12 layers with the parameters of 1"):
            assemble.add_optimizer(job)
    for optim, part in (({"layer_decay": 1.5}, "layer_decay.rate"), ({"gradual_unfreezing": "30m"}, "steps or epochs")):
        with pytest.raises(UserError, match=part):
            configuration.validate(variant(base, tmp_path, "b", **optim))
