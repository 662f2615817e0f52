"""Sequences cut over ranks: the losses, gradients and weights of one rank."""

import copy

import launch
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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


def test_gradients_are_those_of_one_rank(base, tmp_path):
    """Loss and gradients of a step at every ZeRO stage, with 2 and 4 ranks to a sequence, and 2 times 2."""

    def gradients(world: int, runs: dict[str, dict]) -> dict[str, dict]:
        paths = [variant(base, tmp_path, f"{name}_{world}", changes) for name, changes in runs.items()]
        launch.ranks(world, [RUNS, "gradients", tmp_path, *paths])
        return {name: torch.load(tmp_path / f"{name}_{world}.pt") for name in runs}

    expected = gradients(1, KINDS)
    two = {f"packed-{zero}": {"parallel.zero": zero, "parallel.sequence": 2} for zero in range(4)}
    two |= {f"{kind}-{zero}": {**KINDS[kind], "parallel.zero": zero, "parallel.sequence": 2}
            for kind, zero in (("rows", 2), ("lora", 1), ("accumulated", 2), ("accumulated", 3), ("plain_loss", 0))}
    four = {f"packed-{n}": {"parallel.sequence": n, "parallel.zero": zero} for n, zero in ((4, 2), (2, 3))}
    four["rows-4"] = {**KINDS["rows"], "parallel.sequence": 4}
    for world, runs in ((2, two), (4, four)):
        for name, found in gradients(world, runs).items():
            one = expected[name.partition("-")[0]]
            assert abs(found["loss"] - one["loss"]) < 1e-5 * one["loss"], (world, name)
            assert set(found["grads"]) == set(one["grads"])
            largest = max(g.abs().max() for g in one["grads"].values())
            for parameter, grad in one["grads"].items():
                difference = (found["grads"][parameter] - grad).abs().max()
                assert difference <= 1e-5 * largest, (world, name, parameter, difference / largest)
