"""Memory of a rank: by hand, in the order that it must have, and beside what a run takes; `fastft plan CONFIG`."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import launch
from fastft import cli, config
from fastft.errors import UserError
from fastft.plan import activations, changes, configured, memory, told
from fastft.plan.setting import Kept, Setting, Tensors

# 1,000 trained elements in float32, of them a tied embedding of 20 x 10.
SMALL = Tensors(1000, 0, 4000, 0, embedding_bytes=800, head=(20, 10), head_trained=True, tied=True, largest=800)
KEPT = Kept(tokens=5, layers=700, transient=60, ends=90)
PLAIN = Setting(device="cuda", bf16=False, bucket=500)


def of(**options) -> memory.Plan:
    return memory.plan(SMALL, KEPT, dataclasses.replace(PLAIN, **options))


def test_stage_0_by_hand():
    """Weights 4,000, Adam 8,000; the head's gradient (800) comes with the loss, 5 rows of 20 logits and the gradient of
    5 x 10 hidden units beside it.
    """
    step = of().step
    assert step["loss"] == {
        "weights": 4000, "gradients": 800, "optimizer": 8000, "activations": 700 + 200, "logits": 400, "buckets": 0,
    }  # fmt: skip
    assert step["first layer"]["activations"] == 700 + 60 + 200 and step["first layer"]["logits"] == 0
    assert step["last layer"]["gradients"] == 4000 + 800 and step["last layer"]["activations"] == 90
    assert of(accumulates=True).step["loss"]["gradients"] == 4000 + 800


@pytest.mark.parametrize(
    ("options", "trained", "expected"),
    [
        ({"bf16": False, "zero": 0}, 10, 80),
        ({"bf16": False, "zero": 1}, 10, 80),  # the weights are the masters
        ({"bf16": False, "zero": 1, "offload": "optimizer"}, 10, 120),
        ({"bf16": False, "zero": 3}, 10, 80),
        ({"bf16": True, "zero": 2}, 10, 120),
        ({"bf16": True, "zero": 0, "master": "remainder"}, 10, 100),
        ({"bf16": True, "zero": 2, "master": "remainder"}, 10, 120),
        ({"bf16": True, "zero": 3, "master": "stochastic", "state_dtype": "int8"}, 10, 20),
        ({"bf16": True, "zero": 1, "states": 0}, 10, 40),
    ],
)
def test_masters_and_state_by_hand(options, trained, expected):
    assert memory.optimizer(Setting(bucket=500, **options), trained) == expected


def test_offload_by_hand():
    """Of a GPU: the optimizer's half of 8,000, and of the weights, is not there; the host has masters of their own and
    gradients in float32 beside it. A CPU has all of it.
    """
    plain, state, all_ = (of(zero=3, ranks=2, offload=o) for o in (None, "optimizer", "parameters"))
    assert plain.parts["optimizer"] == 4000 and state.parts["optimizer"] == all_.parts["optimizer"] == 0
    assert plain.parts["weights"] == state.parts["weights"] == 2000 and all_.parts["weights"] == 0
    assert state.around["offloaded to the host"] == {"weights": 0, "optimizer": 4000 + 2000 + 2000}
    assert all_.around["offloaded to the host"]["weights"] == 2000
    assert of(zero=1, offload="optimizer", device="cpu").parts["optimizer"] == 12000 + 4000
    both = of(zero=3, ranks=2, offload="optimizer", device="cpu").around["checkpoint"]
    assert both["gradients"] == of(zero=3, ranks=2, device="cpu").around["checkpoint"]["gradients"] + 2000 == 4000


def test_files_by_hand():
    """Masters, two moments and weights of 1,000; frozen weights are in none."""
    offloaded = {"zero": 3, "bucket": 500, "on_disk": True}
    assert memory.files(Setting(**offloaded, offload="optimizer"), SMALL) == 12000
    assert memory.files(Setting(**offloaded, offload="parameters", ranks=2), SMALL) == 16000
    assert memory.files(Setting(zero=3, bucket=500, offload="parameters"), SMALL) == 0
    frozen = dataclasses.replace(SMALL, frozen=1000, frozen_bytes=4000)
    assert memory.files(Setting(**offloaded, offload="parameters"), frozen) == 16000
    kept = memory.plan(frozen, KEPT, Setting(**offloaded, device="cpu", ranks=2, offload="parameters"))
    assert kept.parts["weights"] == 2000


def test_buckets_by_hand():
    """A bucket of 500 elements for 1,000: a GPU's has its size from the first gradient on."""
    one, two, three = (of(zero=z, ranks=2, reuse=1000, prefetch=100).step for z in (1, 2, 3))
    assert one["first layer"]["buckets"] == 2000 and one["loss"]["buckets"] == 0
    assert two["reduction"]["gradients"] == 2000 + 2000  # the bucket, and the rank's half
    assert two["reduction"]["buckets"] == 2000  # the copy that is sent
    assert three["loss"]["buckets"] == 2000 + 2400  # its own, and weights within 1,000 elements both ways, 100 ahead
    assert three["last layer"]["buckets"] == 1600 + 400  # the embedding, and what is sent to make room for its gradient
    assert three["loss"]["weights"] == 2000


setting = st.builds(
    Setting, device=st.sampled_from(["cpu", "cuda"]), zero=st.integers(0, 3), ranks=st.integers(1, 64),
    bf16=st.booleans(), accumulates=st.booleans(), widens=st.just(False), bucket=st.integers(1, 10**4),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(setting)
def test_orders_that_always_hold(s):
    now = memory.plan(SMALL, KEPT, s)
    assert now.peak >= now.training >= sum(now.parts.values()) > 0
    assert all(size >= 0 for moment in (*now.step.values(), *now.around.values()) for size in moment.values())
    more = memory.plan(SMALL, KEPT, dataclasses.replace(s, ranks=2 * s.ranks))
    assert more.parts["optimizer"] <= now.parts["optimizer"]
    longer = memory.plan(SMALL, dataclasses.replace(KEPT, tokens=50, layers=7000), s)
    assert longer.training >= now.training
    cheaper = memory.plan(SMALL, KEPT, dataclasses.replace(s, state_dtype="int8"))
    assert cheaper.training <= now.training


def model_of(path, **options):
    import transformers

    made = transformers.AutoConfig.from_pretrained(path)
    for name, value in options.items():
        setattr(made, name, value)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(made)


HOW = activations.How(fused=False, by_mask=False, checkpointing=False, widens=False, whole=False)


def test_fused_layers_keep_what_the_fused_function_keeps(tiny_llama):
    """Of each token x, query, key and value, attention's output, h, gate and up; two norms' and two heads' numbers."""
    model = model_of(tiny_llama, attention_dropout=0.0)
    kept = activations.kept(model, 2, 16, dataclasses.replace(HOW, fused=True))
    elements = 64 + 3 * 64 + 64 + 64 + 2 * 128 + 2 + 2
    after = 64 + 64 + 1  # the last norm: its input, what it normalized, and a number for each token
    assert kept.traced and kept.layers == pytest.approx(32 * 4 * (2 * elements + after), rel=0.1)
    plain = activations.kept(model_of(tiny_llama), 2, 16, HOW)
    assert plain.layers > 1.3 * kept.layers


def test_checkpointing_keeps_inputs_only(tiny_llama):
    plain = activations.kept(model_of(tiny_llama, num_hidden_layers=8), 2, 16, HOW)
    less = activations.kept(
        model_of(tiny_llama, num_hidden_layers=8), 2, 16, dataclasses.replace(HOW, checkpointing=True)
    )
    assert less.layers < plain.layers / 4 and less.transient > plain.transient


def test_a_model_is_counted_without_its_weights(lm_config, tmp_path):
    """Its weights are not there at all."""
    import shutil

    folder = tmp_path / "empty"
    shutil.copytree(lm_config["model"]["path"], folder)
    (folder / "model.safetensors").unlink()
    lm_config["model"]["path"] = str(folder)
    found = configured.planned(config.validate(lm_config), "cpu", 2)
    assert found.shape.layers == 2 and found.tensors.tied is False
    assert found.batching == configured.Batching(size=6, rows=3, width=64, accumulation=1)
    lora = configured.planned(
        config.validate({**lm_config, "model": {"path": str(folder), "lora": {"r": 2}}}), "cpu", 2
    )
    assert 0 < lora.tensors.trained < found.tensors.trained / 10 and lora.setting.adapter_only
    few = {"path": str(folder), "lora": {"r": 2}, "quantize": "nf4"}
    quantized = configured.planned(config.validate({**lm_config, "model": few}), "cpu", 2).tensors
    assert quantized.frozen == lora.tensors.frozen and quantized.frozen_bytes < 0.8 * lora.tensors.frozen_bytes


def test_rounding_by_rows_by_hand(lm_config):
    """1,000 rows of 64 tokens, each twice, with three inner sizes (128) and six hidden ones (64) of float32, beside the
    whole base. On a CPU that is the fullest moment until the last step; a GPU does not have it.
    """
    lm_config["model"] |= {"lora": {"r": 2}, "quantize": {"format": "nf4", "calibrate": 1000}}
    found = configured.planned(config.validate(lm_config), "cpu", 1)
    whole = 4 * (2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64)
    rounding = found.plan.around["rounding"]
    assert rounding == {"weights": whole, "rows": 2 * 64_000 * (3 * 128 + 6 * 64) * 4, "matrices": 60 * 128**2}
    assert found.plan.training == sum(rounding.values()) > sum(found.plan.parts.values())
    gpu = configured.planned(config.validate(lm_config), "cuda", 1)
    assert gpu.plan.around["rounding"] == rounding and gpu.plan.training < rounding["rows"]
    assert found.plan.peak == found.plan.training and max(found.plan.moments, key=found.plan.moments.get) == "rounding"
    fewer = [c for c in changes.candidates(found) if "model.quantize.calibrate" in c.keys]
    assert [c.overrides[0].partition("=")[2] for c in fewer] == ["500", "250", "125", "62", "31", "0"]
    del lm_config["model"]["quantize"]["calibrate"]
    assert "rounding" not in configured.planned(config.validate(lm_config), "cpu", 1).plan.around


@pytest.mark.parametrize(("limit", "micro", "rows"), [(80, 48, 125), (20, 1, 31), (5, 1, 0)])
def test_fewer_rows_go_with_other_changes(capsys, lm_config, tmp_path, limit, micro, rows):
    """Where both a step and rounding are too large, and no more of either than has to be."""
    lm_config["model"] |= {"lora": {"r": 2}, "quantize": {"format": "nf4", "calibrate": 1000}}
    lm_config["batch"] |= {"size": 96, "micro": 96}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    room = memory.PROCESS_BYTES + limit * 1e6
    code, output = run(capsys, path, "--memory", f"{room:.0f}", "--json")
    told_ = json.loads(output)
    assert code == 0 and told_["memory"]["fullest_of_all"] == "rounding" and not told_["memory"]["fits"]
    offered = [o["overrides"] for o in told_["changes"]]
    assert [f"batch.micro={micro}", f"model.quantize.calibrate={rows}"] in map(sorted, offered), offered


def test_files_are_planned_for_other_machines(capsys, lm_config, tmp_path):
    """Only a run needs the folder."""
    lm_config["parallel"] = {"zero": 1, "offload": "optimizer", "offload_dir": "/no/such/folder"}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    assert "in parallel.offload_dir" in run(capsys, path)[1]
    code, output = launch.fastft("validate", path, check=False)
    assert code != 0 and "/no/such/folder: no such folder" in output


def test_a_model_whose_embedding_transformers_does_not_know(capsys, classification_config, tmp_path):
    from transformers import CanineConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    CanineConfig(**sizes, num_hash_buckets=64, max_position_embeddings=64).save_pretrained(tmp_path / "canine")
    classification_config["model"] = {"path": str(tmp_path / "canine"), "lora": {"r": 2}}
    code, output = run(capsys, launch.write_config(tmp_path / "c.yaml", classification_config))
    assert code == 0 and "fits: " in output


def test_layers_that_peft_refuses(capsys, lm_config, tmp_path):
    from transformers import MambaConfig

    MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=512).save_pretrained(tmp_path / "mamba")
    lm_config["model"] = {"path": str(tmp_path / "mamba"), "lora": {"r": 2}}
    code, output = run(capsys, launch.write_config(tmp_path / "c.yaml", lm_config))
    assert code != 0 and "error: model.lora: peft refuses MambaForCausalLM" in output and "model.lora.targets" in output


def test_rounding_by_rows_is_refused_as_the_run_refuses_it(capsys, lm_config, tmp_path):
    """A model with an encoder and a decoder."""
    import transformers

    sizes = {"d_model": 64, "d_ff": 128, "num_layers": 1, "num_heads": 2, "d_kv": 32, "vocab_size": 512}
    transformers.T5Config(**sizes, decoder_start_token_id=0).save_pretrained(tmp_path / "t5")
    transformers.AutoTokenizer.from_pretrained(lm_config["model"]["path"]).save_pretrained(tmp_path / "t5")
    lm_config["task"], lm_config["data"]["truncation"] = "seq2seq", "truncate"
    lm_config["model"] = {"path": str(tmp_path / "t5"), "lora": {"r": 2}}
    lm_config["model"]["quantize"] = {"format": "nf4", "calibrate": 16}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    code, output = run(capsys, path)
    assert code != 0 and "has an encoder and a decoder" in output


@pytest.mark.parametrize("fixture", ["classification_config", "lm_config"])
def test_every_kind_of_model_is_traced(request, fixture):
    found = configured.planned(config.validate(request.getfixturevalue(fixture)), "cuda", 1)
    assert found.plan.kept.traced and found.plan.kept.layers > 0


def run(capsys, *arguments):
    try:
        cli.main(["plan", *map(str, arguments)])
        code = 0
    except SystemExit as e:
        code = e.code or 0
    return code, "".join(capsys.readouterr())


def test_what_makes_it_fit(capsys, lm_config, tmp_path):
    """An adapter on one GPU; more together where one is not enough; nothing where it fits."""
    lm_config["run"]["device"] = "auto"
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    whole = json.loads(run(capsys, path, "--hardware", "h100", "--gpus", 2, "--json")[1])
    assert whole["memory"]["fits"] and whole["changes"] == [] and whole["time"]["step_seconds"] > 0
    need = whole["memory"]["need"]
    code, text = run(capsys, path, "--hardware", "h100", "--memory", f"{need - 200_000}", "--gpus", 2)
    assert code == 0 and "does not fit" in text and "parallel.zero=" in text
    tight = json.loads(run(capsys, path, "--memory", f"{need - 200_000}", "--gpus", 2, "--json")[1])
    assert tight["changes"] and all(c["need"] <= need - 200_000 for c in tight["changes"])
    assert [c["work"] for c in tight["changes"]] == sorted(c["work"] for c in tight["changes"])
    none = json.loads(run(capsys, path, "--memory", "1GB", "--json")[1])
    assert none["changes"] == [] and not none["memory"]["fits"]


def test_changes_are_priced(lm_config):
    found = configured.planned(config.validate({**lm_config, "parallel": {"zero": 1}}), "cuda", 4)
    keys = [c.overrides[0].partition("=")[0] for c in changes.candidates(found) if c.overrides]
    assert {"parallel.zero", "parallel.activation_checkpointing", "optim.state_dtype", "model.dtype", "model.lora"} <= {
        *keys
    }
    assert {"parallel.offload", "parallel.sequence"} <= {*keys}
    assert "optim.master" not in keys  # of bf16 weights alone


def test_offload_and_sequences_are_offered_with_their_price(capsys, lm_config, tmp_path):
    """Where the optimizer alone does not fit: the host's memory takes it, and its step takes longer there. Where one
    long sequence does not: ranks share it, but not more than divide the heads.
    """
    lm_config["run"]["device"] = "auto"
    lm_config["parallel"] = {"zero": 3}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    few = configured.planned(config.validate(lm_config), "cuda", 2)
    need = few.plan.training + few.plan.process
    less = need - few.plan.parts["optimizer"] // 2
    found = json.loads(run(capsys, path, "--hardware", "h100", "--memory", str(less), "--gpus", "2", "--json")[1])
    offers = {tuple(c["overrides"]): c for c in found["changes"]}
    offload = next(c for keys, c in offers.items() if "parallel.offload=optimizer" in keys)
    assert offload["time"] > 1 and "host" in offload["words"], offers
    own = [c.overrides for c in changes.candidates(configured.planned(config.validate(lm_config), "cuda", 8))]
    assert [o for o in own if "parallel.sequence" in str(o)] == [(f"parallel.sequence={n}",) for n in (2, 4, 8)]
    lm_config["parallel"]["sequence"] = 64
    with pytest.raises(UserError, match="attention heads"):
        configured.planned(config.validate(lm_config), "cuda", 64)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("40GiB", 40 * 2**30), ("8e10", 8e10), ("512 mb", 512e6), ("1t", 1e12)]
)
def test_sizes_as_people_write_them(text, size):
    assert told.size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-3GB", "much", "i", "80XB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="--memory"):
        told.size(text)


def test_options_of_configurations_alone(capsys):
    code, text = run(capsys, "--params", "7B", "--memory", "80GB")
    assert code == 1 and "--memory" in text


def test_a_run_stands_beside_its_plan(capsys, lm_config, tmp_path):
    """The plan of a run's folder has what the run took, and says nothing of one with other settings."""
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    launch.fastft("train", path, "train.steps=2")
    folder = lm_config["run"]["dir"]
    found = json.loads(run(capsys, folder, "--json")[1])
    beside = found["measured"]
    assert beside["ranks"] == 1 and beside["memory"] > 3e8
    assert beside["error"] == pytest.approx(found["memory"]["training"] / beside["memory"] - 1)
    assert "measured in" in run(capsys, folder)[1]
    other = json.loads(run(capsys, path, "batch.size=2", "--json")[1])["measured"]
    assert other["error"] is None
