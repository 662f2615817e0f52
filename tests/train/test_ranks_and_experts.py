"""Two ranks draw their own dropout masks, and repeat them after a resume; routers that stay in float32."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

import launch
from fastft import track

RUNS = launch.ROOT / "tests" / "train" / "runs.py"


def losses(folder) -> list[float]:
    return [r["loss"] for r in track.read(folder) if r["kind"] == "train"]


@pytest.fixture
def dropout(lm_config, tiny_llama, tmp_path):
    """The same text in every row, and half of the attention dropped: the masks alone make a loss another."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_pretrained(tiny_llama, attention_dropout=0.5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    rows = [json.dumps({"text": "The class statement is an executable statement."})] * 32
    (tmp_path / "same.jsonl").write_text("\n".join(rows) + "\n")
    lm_config["model"]["path"] = str(folder)
    lm_config["data"] = {"train": str(tmp_path / "same.jsonl"), "packing": "none", "max_length": 64}
    lm_config["data"]["cache"] = str(tmp_path / "prepared")
    lm_config["checkpoint"] = {"every": 2}
    return lm_config


def run_of(config, tmp_path, name, ranks, steps, verb="train"):
    config = copy.deepcopy(config)
    config["batch"] = {"size": ranks, "micro": 1}
    config["train"]["steps"] = steps
    config["run"]["dir"] = str(tmp_path / name)
    path = launch.write_config(tmp_path / f"{name}.yaml", config)
    launch.ranks(ranks, ["-m", "fastft", verb, path if verb == "train" else tmp_path / name, f"train.steps={steps}"])
    return losses(tmp_path / name)


def test_masks_differ_by_rank_and_come_back_after_a_resume(dropout, tmp_path):
    one, two = (run_of(dropout, tmp_path, f"r{n}", n, 4) for n in (1, 2))
    assert all(abs(a - b) > 1e-6 for a, b in zip(one, two, strict=True)), "the second rank's masks are not the first's"
    run_of(dropout, tmp_path, "again", 2, 2)
    assert run_of(dropout, tmp_path, "again", 2, 4, "resume") == two


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_weights_that_transformers_keeps_in_float32(lm_config, tmp_path, zero):
    """DeepSeek-V3's routers and their biases: float32 in the exported folder of a bf16 run, all else bf16."""
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    config = transformers.DeepseekV3Config(
        **sizes, **heads, **experts, moe_intermediate_size=32, first_k_dense_replace=1
    )
    transformers.DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "m")
    transformers.AutoTokenizer.from_pretrained(lm_config["model"]["path"]).save_pretrained(tmp_path / "m")
    lm_config["model"] = {"path": str(tmp_path / "m"), "dtype": "bf16"}
    lm_config["parallel"] = {"zero": zero}
    lm_config["train"]["steps"] = 2
    launch.ranks(1, ["-m", "fastft", "train", launch.write_config(tmp_path / "c.yaml", lm_config)])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", dtype="auto", output_loading_info=True
    )
    kept = {name for name, t in model.state_dict().items() if t.dtype == torch.float32}
    assert {name.rpartition("mlp.")[2] for name in kept} == {"gate.weight", "gate.e_score_correction_bias"}
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(np.isfinite(losses(tmp_path / "run")))


def test_layers_dropped_at_random_on_ranks_that_share_them(lm_config):
    from types import SimpleNamespace

    from fastft import config as configuration
    from fastft.errors import UserError
    from fastft.ranks import Ranks
    from fastft.zero.engine import check_layers

    model = SimpleNamespace(config=transformers.BartConfig(encoder_layerdrop=0.1))
    for zero, world, refused in ((0, 2, False), (1, 1, False), (1, 2, True), (3, 2, True)):
        config = configuration.validate({**lm_config, "parallel": {"zero": zero}})
        ranks = Ranks(0, world, 0, world, torch.device("cpu"))
        if refused:
            with pytest.raises(UserError, match=r"encoder_layerdrop = 0.1(.|\n)*parallel.zero: 0"):
                check_layers(model, config, ranks)
        else:
            check_layers(model, config, ranks)
