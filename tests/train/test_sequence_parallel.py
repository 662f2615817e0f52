"""Sequences cut over ranks: the losses, gradients and weights of one rank."""

import copy
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import launch
from fastft import assemble, track
from fastft import config as configuration
from fastft.errors import UserError
from fastft.evaluate.validate import validate_run
from fastft.plan.configured import planned
from fastft.ranks import Ranks

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
RUNS = launch.ROOT / "tests" / "train" / "runs.py"


@pytest.fixture(scope="session")
def grouped_llama(tmp_path_factory, tiny_llama):
    """4 heads of queries in 2 groups, no dropout, 2 layers; rotary positions that matter."""
    folder = tmp_path_factory.mktemp("grouped_llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(lm_config, grouped_llama) -> dict:
    lm_config["model"]["path"] = str(grouped_llama)
    lm_config["data"]["max_length"] = 62  # 4 ranks do not divide it
    return lm_config


def variant(base: dict, tmp_path, name: str, changes: dict):
    config = copy.deepcopy(base)
    config["run"]["dir"] = str(tmp_path / name)
    config["data"]["cache"] = str(tmp_path / "prepared")
    for key, value in changes.items():
        section, _, field = key.partition(".")
        config.setdefault(section, {})[field] = value
    return launch.write_config(tmp_path / f"{name}.yaml", config)


LORA = {"model.lora": {"r": 4, "alpha": 8}}
KINDS = {
    "packed": {},
    "rows": {"data.packing": "none", "data.truncation": "truncate"},
    "lora": LORA,
    "accumulated": {"batch.micro": 2, "parallel.activation_checkpointing": True},
    "plain_loss": {"loss.implementation": "cross_entropy"},
}


def windowed(llama, folder):
    """The same weights as a Mistral, whose tokens see 9 each."""
    shutil.copytree(llama, folder / "windowed")
    settings = json.loads((llama / "config.json").read_text())
    settings |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 9}
    (folder / "windowed" / "config.json").write_text(json.dumps(settings))
    return folder / "windowed"


def test_gradients_are_those_of_one_rank(base, tmp_path, grouped_llama):
    """Loss and gradients of a step at every ZeRO stage, with 2 and 4 ranks to a sequence, and 2 times 2."""

    def gradients(world: int, runs: dict[str, dict]) -> dict[str, dict]:
        paths = [variant(base, tmp_path, f"{name}_{world}", changes) for name, changes in runs.items()]
        launch.ranks(world, [RUNS, "gradients", tmp_path, *paths])
        return {name: torch.load(tmp_path / f"{name}_{world}.pt") for name in runs}

    kinds = KINDS | {"window": {"model.path": str(windowed(grouped_llama, tmp_path))}}
    expected = gradients(1, kinds)
    two = {f"packed-{zero}": {"parallel.zero": zero, "parallel.sequence": 2} for zero in range(4)}
    for kind, zero in (("rows", 2), ("lora", 1), ("accumulated", 3), ("plain_loss", 0), ("window", 1)):
        two[f"{kind}-{zero}"] = {**kinds[kind], "parallel.zero": zero, "parallel.sequence": 2}
    four = {f"packed-{n}": {"parallel.sequence": n, "parallel.zero": zero} for n, zero in ((4, 2), (2, 3))}
    assert abs(expected["window"]["loss"] - expected["packed"]["loss"]) > 1e-3  # the window is there
    for world, runs in ((2, two), (4, four)):
        for name, found in gradients(world, runs).items():
            one = expected[name.partition("-")[0]]
            assert abs(found["loss"] - one["loss"]) < 1e-5 * one["loss"], (world, name)
            assert set(found["grads"]) == set(one["grads"])
            largest = max(g.abs().max() for g in one["grads"].values())
            for parameter, grad in one["grads"].items():
                difference = (found["grads"][parameter] - grad).abs().max()
                assert difference <= 1e-5 * largest, (world, name, parameter, difference / largest)


def curve(run, key: str = "loss") -> list[float]:
    return [r[key] for r in track.read(run) if r["kind"] == "train"]


def evaluations(run) -> list[dict]:
    skipped = ("time", "kind", "seconds")
    return [{k: v for k, v in r.items() if k not in skipped} for r in track.read(run) if r["kind"] == "eval"]


def close(a, b, tolerance: float = 1e-5) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= tolerance * abs(y) for x, y in zip(a, b, strict=True))


def test_documents_do_not_see_each_other(base, tmp_path):
    """Through the engine, whatever lies beside them in the row, and on which rank."""
    paths = [variant(base, tmp_path, f"zero{zero}", {"parallel.sequence": 2, "parallel.zero": zero}) for zero in (1, 3)]
    launch.ranks(2, [RUNS, "isolated", tmp_path, *paths])
    for path in paths:
        found = json.loads(path.with_suffix(".json").read_text())
        assert found["own"] == 0 and found["rest"] > 0.01 and found["alone"] < 1e-5, found


def test_runs_are_those_of_one_rank(base, tmp_path):
    """Losses, norms, counts, evaluations and weights of whole runs, which go on with the other number of ranks."""
    write_chats(tmp_path)
    chats = {"task": "sft", "data": {"train": str(tmp_path / "chats.jsonl"), "eval": str(tmp_path / "chats.jsonl"),
             "chat_template": TEMPLATE, "max_length": 62}}  # fmt: skip
    saved = {"checkpoint.every": 2, "train.eval_every": 2, "evaluation.bootstrap": 100, "optim.weight_decay": 0.1}
    one = variant(base, tmp_path, "one", {**saved, "parallel.zero": 1})
    sft_one = variant({**base, **chats}, tmp_path, "sft_one", {"batch.size": 5})
    launch.ranks(1, [RUNS, "train", one, sft_one])
    two = variant(base, tmp_path, "two", {**saved, "parallel.zero": 3, "parallel.sequence": 2})
    sft_two = variant({**base, **chats}, tmp_path, "sft_two",
                      {"batch.size": 5, "parallel.zero": 1, "parallel.sequence": 2})  # fmt: skip
    back = continued(tmp_path, "one", "back")
    launch.ranks(2, [RUNS, "train", two, sft_two])
    launch.ranks(2, ["-m", "fastft", "resume", back, "parallel.sequence=2", "parallel.zero=2"])
    on = continued(tmp_path, "two", "on")
    launch.ranks(1, ["-m", "fastft", "resume", on, "parallel.sequence=1", "parallel.zero=2"])
    for name, truth in (("two", "one"), ("sft_two", "sft_one")):
        for key in ("loss", "grad_norm"):
            assert close(curve(tmp_path / name, key), curve(tmp_path / truth, key)), (name, key)
        assert curve(tmp_path / name, "padding") == curve(tmp_path / truth, "padding")
        found, expected = (evaluations(tmp_path / n) for n in (name, truth))
        assert [e["tokens"] for e in found] == [e["tokens"] for e in expected] and len(expected) == len(found) > 0
        assert close([e["loss"] for e in found], [e["loss"] for e in expected])
        ends = ([end for e in es for end in e.get("intervals", {"loss": []})["loss"]] for es in (found, expected))
        assert close(*ends)
        weights, theirs = (load_file(tmp_path / n / "model" / "model.safetensors") for n in (name, truth))
        # By norms: where a gradient is nothing but rounding, Adam makes a whole step of it.
        assert all((weights[n] - w).norm() <= 3e-5 * w.norm() for n, w in theirs.items())
    for name in ("back", "on"):
        assert close(curve(tmp_path / name), curve(tmp_path / "one")[2:]), name
    rates = [r["tokens_per_second"] for r in track.read(tmp_path / "two") if r["kind"] == "end"]
    seconds = [r["train_seconds"] for r in track.read(tmp_path / "two") if r["kind"] == "end"]
    counted = next(r for r in track.read(tmp_path / "one") if r["kind"] == "end")
    assert abs(rates[0] * seconds[0] - counted["tokens_per_second"] * counted["train_seconds"]) < 1
    record = next(r for r in track.read(tmp_path / "two") if r["kind"] == "run")
    assert "over 2 ranks" in record["attention"] and record["world_size"] == 2


def write_chats(folder) -> None:
    """Answers of different weights and lengths, some longer than half a row."""
    rows = [
        [
            {"role": "user", "content": f"Count to {n}:"},
            {"role": "assistant", "content": " ".join(map(str, range(n))), "weight": 1 + n % 3 / 4},
        ]
        for n in range(2, 18)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def continued(folder, run: str, name: str):
    """The run as it was after its step 2."""
    gone = shutil.ignore_patterns("step-4", "step-00000004", "model", "metrics.jsonl")
    shutil.copytree(folder / run, folder / name, ignore=gone)
    settings = yaml.safe_load((folder / name / "config.yaml").read_text())
    settings["run"]["dir"] = str(folder / name)
    (folder / name / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel.sequence": 3}, r"parallel.sequence: 3: .* 4 attention heads, which do not divide"),
        ({"parallel.sequence": 2, "model.attention": "sdpa"}, "parallel.sequence: 2: model.attention: sdpa"),
    ],
)
def test_what_does_not_fit_is_refused(base, tmp_path, changes, message):
    config = configuration.load(variant(base, tmp_path, "c", changes))
    with pytest.raises(UserError, match=message):
        validate_run(config)


def test_other_tasks_are_refused(classification_config):
    config = configuration.validate({**classification_config, "parallel": {"sequence": 2}})
    with pytest.raises(UserError, match="task: classification does not cut its sequences; causal_lm, sft do"):
        assemble.start(config)


def test_ranks_that_do_not_divide_are_refused(base, tmp_path):
    """Before any data is prepared. `fastft validate`, in one process, takes the run for that of two."""
    path = variant(base, tmp_path, "alone", {"parallel.sequence": 2})
    code, said = launch.fastft("train", path, check=False)
    assert code == 1 and "parallel.sequence: 2 ranks share a sequence, which 1 rank does not divide into" in said
    assert not (tmp_path / "prepared").exists()
    grid = Ranks(4, 6, 4, 6, torch.device("cpu")).with_sequences(3)
    assert (grid.data_rank, grid.data_world, grid.sequence_rank) == (1, 2, 1)
    with pytest.raises(UserError, match="6 ranks do not divide"):
        grid.with_sequences(4)
    report = validate_run(configuration.load(path))
    assert report["footprint"]["ranks"] == 2


def test_attention_with_dropout_is_refused(base, tmp_path, tiny_llama):
    path = variant(base, tmp_path, "dropout", {"parallel.sequence": 2, "model.path": str(tiny_llama)})
    with pytest.raises(AssertionError, match=r"parallel.sequence: 2: LlamaForCausalLM .*: its attention has dropout"):
        launch.ranks(2, [RUNS, "train", path])


def test_plans_divide_activations(base):
    whole, half = (planned(configuration.validate({**base, "parallel": {"sequence": n}}), "cpu", 2) for n in (1, 2))
    assert half.batching.rows == 2 * whole.batching.rows == base["batch"]["size"] and half.batching.width == 62
    assert half.plan.kept.tokens == whole.plan.kept.tokens
    plain = {**base, "batch": {"micro": 1}, "model": {**base["model"], "layers": "plain"}}
    one, two = (planned(configuration.validate({**plain, "parallel": {"sequence": n}}), "cpu", 2) for n in (1, 2))
    assert two.plan.kept.tokens * 2 == one.plan.kept.tokens
    assert two.plan.kept.layers < 0.55 * one.plan.kept.layers
