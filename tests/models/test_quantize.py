"""A base in 4 or 8 bits: what it computes with, that its adapter learns at ZeRO 0 to 2, and what is exported."""

import json
import shutil
import sys

import jobs
import peft
import pytest
import torch
import transformers
from models.test_lora import losses, run
from safetensors.torch import load_file
from test_mapped import resident

import launch
from fastft import assemble, track
from fastft import config as configuration
from fastft.errors import UserError
from fastft.models.edits.quantize import Quantize, QuantizeSettings, dequantized, is_quantized, quantized
from fastft.train import checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture
def config(lm_config) -> dict:
    lm_config["model"] |= {"lora": {"r": 4}, "quantize": "nf4", "dtype": "bf16"}
    lm_config["optim"]["lr"] = 1e-2
    lm_config["train"]["steps"] = 6
    return lm_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format, block, error", [("nf4", 64, 0.1), ("nf4", 32, 0.09), ("int8", 64, 0.02)])
def test_the_numbers_are_those_that_the_layer_computes_with(format, block, error, dtype):
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 96).to(dtype)
    settings = QuantizeSettings(format=format, block=block)
    layer = quantized(plain, settings)
    assert is_quantized(layer) and not layer.weight.requires_grad and layer.bias is plain.bias
    scales = {"nf4": lambda: layer.weight.quant_state.absmax.nbytes, "int8": lambda: 0}[format]()
    told = settings.bytes * plain.weight.numel()
    assert told - 4 * 128 * 96 / block / 256 - 1 <= layer.weight.nbytes + scales <= told
    weight = dequantized(layer)
    assert weight.shape == plain.weight.shape and weight.dtype == torch.float32
    assert ((weight - plain.weight.float()).norm() / plain.weight.float().norm()).item() < error
    x = torch.randn(7, 128).to(dtype)
    found, wanted = layer(x), torch.nn.functional.linear(x.float(), weight, plain.bias.float())
    rounding = 2e-2 if dtype == torch.bfloat16 or format == "int8" else 1e-5  # int8 rounds the input, too
    assert ((found.float() - wanted).norm() / wanted.norm()).item() < rounding


def test_what_is_quantized(config):
    """The inner linear layers: not the head, nor the embedding."""
    job = jobs.job_of(config)
    kinds = {name.removesuffix(".base_layer"): is_quantized(m) for name, m in job.model.named_modules()}
    found = [name for name, yes in kinds.items() if yes]
    layers = job.model.config.num_hidden_layers
    assert len(found) == 7 * layers == job.record["quantize"]["layers"] and "lm_head" not in found
    assert {p.dtype for p in job.model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
@pytest.mark.parametrize("quantize", ["nf4", "int8", {"format": "nf4", "calibrate": 4}], ids=["nf4", "int8", "rows"])
def test_the_whole_weights_are_not_kept_in_memory(config, tmp_path, tiny_llama, quantize):
    """The file stays mapped for the embedding, which is of one page here."""
    folder = tmp_path / "wide"
    shutil.copytree(tiny_llama, folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    wide = transformers.LlamaConfig.from_pretrained(tiny_llama, **sizes)
    transformers.LlamaForCausalLM(wide).to(torch.bfloat16).save_pretrained(folder)
    config["model"] |= {"path": str(folder), "quantize": quantize}
    job = jobs.job_of(config)
    whole = (folder / "model.safetensors").stat().st_size
    left = sum(p.nbytes for p in job.model.parameters() if p.dtype == torch.bfloat16 and not p.requires_grad)
    assert left < whole / 6
    assert 0 < resident(folder / "model.safetensors") < left + whole / 20


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_every_stage_learns_the_same(config, tmp_path, format):
    """On two ranks, as the same base without quantizing does nearly; the checkpoints hold the adapter alone."""
    config["model"]["quantize"] = format
    runs = [run(config, tmp_path, f"zero{z}", 2, parallel__zero=z) for z in range(3)]
    first = losses(runs[0])
    assert first[-1] < first[0] - 0.05
    for other in runs[1:]:
        assert losses(other) == pytest.approx(first, rel=5e-3)
    plain = run({**config, "model": {**config["model"], "quantize": None}}, tmp_path, "plain", 2)
    assert losses(plain) == pytest.approx(first, rel=2e-2) and losses(plain) != first
    for folder in runs:
        path, manifest, _ = checkpoint.find(folder / "checkpoints")
        assert all("lora_" in name for name in checkpoint.stored(path, manifest).weights())
        adapter = load_file(folder / "model" / "adapter_model.safetensors")
        assert all(t.any() for name, t in adapter.items() if "lora_B" in name) and len(adapter) == 28


def test_resume_is_bit_exact(config, tmp_path):
    config["checkpoint"] = {"every": 3, "keep": 9}
    whole = run(config, tmp_path, "whole", 1, parallel__zero=1)
    again = tmp_path / "again"
    (tmp_path / "whole").rename(again)
    for name in ("checkpoints/step-6", "model"):
        (again / name).rename(tmp_path / name.replace("/", "-"))
    (again / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    launch.fastft("resume", again)
    from train.test_resume import same_checkpoints

    same_checkpoints(tmp_path / "checkpoints-step-6", again / "checkpoints" / "step-6")
    assert not whole.exists()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_merged_model_computes_what_was_trained(config, tmp_path, format):
    """Its weights are the quantized base's numbers and the adapter's; peft on the same quantized base says the same,
    and the adapter's folder is opened on that base.
    """
    config["model"] |= {"quantize": format}
    folder = run(config, tmp_path, "run", 1)
    launch.fastft("export", folder, tmp_path / "merged", "--merge", "--dtype", "fp32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not any(is_quantized(m) for m in merged.modules())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.bfloat16)
    for name, layer in list(base.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            layer.weight.data = dequantized(quantized(layer, QuantizeSettings(format=format)))
    opened = assemble.trained(str(folder / "model")).model
    for name in json.loads((folder / "model" / "quantized.json").read_text())["layers"]:
        assert torch.equal(opened.get_submodule(name).weight, base.get_submodule(name).weight)
    base = base.float()
    model = peft.PeftModel.from_pretrained(base, folder / "model").eval()
    ids = torch.randint(3, 200, (2, 24))
    with torch.no_grad():
        found, wanted = merged(ids).logits, model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)

    trained = [r["loss"] for r in track.read(folder) if r["kind"] == "eval"][-1]
    for ranks in (1, 2) if format == "nf4" else ():  # int8 rounds the inputs, too
        output = launch.ranks(ranks, ["-m", "fastft", "eval", folder, "--json"])[0]
        loss = json.loads(output.strip().splitlines()[-1])["eval"]["loss"]
        assert loss == pytest.approx(trained, rel=1e-6)
    about = folder / "model" / "quantized.json"
    said = about.read_text()
    for broken, message in (
        (said.replace("q_proj", "z_proj", 1), r"does not fit the base \(AttributeError: .*z_proj"),
        (said.replace('"layers": [', '"layers": ["model.norm", '), r"does not fit the base \(ValueError"),
        (said.replace(format, "nf5"), "does not fit the base"),
        ('{"quantized.safetensors": null}', "says neither how"),
        ("[" * 100_000, "cannot be read"),
    ):
        about.write_text(broken)
        with pytest.raises(UserError, match=f"quantized.json: (is missing or )?{message}"):
            assemble.trained(str(folder / "model"))


def test_rounded_by_rows_is_the_same_everywhere(config, tmp_path):
    """On any number of ranks, at any stage, after a resume and in every export: what the run's file holds."""
    settings = {"format": "nf4", "block": 32, "calibrate": 8}
    config["model"]["quantize"] = settings
    config["checkpoint"] = {"every": 3, "keep": 9}
    job = jobs.job_of(config | {"run": {**config["run"], "dir": str(tmp_path / "here")}})
    layers = {name: m for name, m in job.model.named_modules() if is_quantized(m)}
    plain = transformers.AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.bfloat16)
    for name, layer in layers.items():
        whole = plain.get_submodule(name.removesuffix(".base_layer"))
        error = (dequantized(layer) - whole.weight.float()).norm() / whole.weight.float().norm()
        alone = quantized(whole, QuantizeSettings(format="nf4", block=32))
        assert 0 < error < 0.2 and not torch.equal(dequantized(layer), dequantized(alone))
        assert layer.weight.quant_state.blocksize == 32
    assert len(layers) == 14 and job.record["quantize"] == {"layers": 14, **settings}

    runs = [run(config, tmp_path, f"zero{z}", ranks, parallel__zero=z) for z, ranks in ((0, 1), (1, 2), (2, 2))]
    # Each rounded for itself, and sums of floats differ in their last bits with where the memory lies.
    files = [load_file(folder / "quantized.safetensors") for folder in (tmp_path / "here", *runs)]
    codes = [torch.cat([t.flatten() for name, t in sorted(f.items()) if name.endswith(".weight")]) for f in files]
    assert all((other == codes[0]).float().mean() > 0.95 for other in codes[1:])
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-2)
    assert losses(runs[2]) == pytest.approx(losses(runs[0]), rel=1e-2)

    # a resume takes the file, whatever rows would give there
    folder, wanted = runs[1], losses(runs[1])
    shutil.rmtree(folder / "model")
    (folder / "checkpoints" / "step-6").rename(tmp_path / "step-6")
    launch.ranks(2, ["-m", "fastft", "resume", str(folder)])
    from train.test_resume import same_checkpoints

    same_checkpoints(tmp_path / "step-6", folder / "checkpoints" / "step-6")
    assert losses(folder)[-3:] == wanted[-3:]

    assert "trained beside the base's linear layers as they are in" in (folder / "model" / "README.md").read_text()

    # an adapter is opened on the numbers that it was trained beside; the merged model computes the same
    launch.fastft("export", folder, tmp_path / "merged", "--merge", "--dtype", "fp32")
    assert not (tmp_path / "merged" / "quantized.safetensors").exists()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    opened = assemble.trained(str(folder / "model")).model.float()
    ids = torch.randint(3, 200, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, opened(ids).logits, rtol=1e-2, atol=1e-2)
    for name, layer in layers.items():
        assert torch.equal(opened.get_submodule(name).weight, dequantized(layer))

    # an exported adapter without its file, or with another one
    exported = folder / "model" / "quantized.safetensors"
    content = exported.read_bytes()
    exported.write_bytes(content[:-9])
    with pytest.raises(UserError, match="is not the file that the adapter was exported with"):
        assemble.trained(str(folder / "model"))
    exported.unlink()
    with pytest.raises(UserError, match=r"quantized.safetensors: is missing"):
        assemble.trained(str(folder / "model"))
    exported.write_bytes(content)

    # without the file, or with other numbers in it
    file = folder / "quantized.safetensors"
    file.rename(tmp_path / "aside")
    code, output = launch.fastft("export", folder, tmp_path / "again", check=False)
    assert code == 1 and "Put the file back" in " ".join(output.split()), output[-1500:]
    shutil.copyfile(tmp_path / "aside", file)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, output = launch.fastft("resume", folder, "train.steps=8", check=False)
    assert code == 1 and "holds other weights than the adapter was trained on" in " ".join(output.split())


def test_a_refused_resume_leaves_the_rounded_base(config, tmp_path):
    config["model"]["quantize"] = {"format": "nf4", "calibrate": 4}
    folder = run(config, tmp_path, "run", 1)
    file = folder / "quantized.safetensors"
    before = file.read_bytes()
    code, output = launch.fastft("resume", folder, "train.steps=8", "model.quantize.block=32", check=False)
    said = " ".join(output.split())
    assert code == 1 and "made with another model.quantize" in said and "checkpoints were trained beside it" in said
    file.write_bytes(before[: len(before) // 2])
    code, output = launch.fastft("resume", folder, "train.steps=8", check=False)
    assert code == 1 and "cannot be read" in output and len(file.read_bytes()) == len(before) // 2
    file.write_bytes(before)
    launch.fastft("resume", folder, "train.steps=8")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "model, zero, said",
    [
        ({"quantize": {"format": "int8", "calibrate": 8}}, 0, "only nf4 is rounded by rows"),
        ({"quantize": {"format": "int8", "block": 32}}, 0, "only nf4 has blocks"),
        ({"quantize": {"format": "nf4", "calibrate": 8}, "attention": "flash_attention_2"}, 0, "attention at auto"),
        ({"lora": None}, 0, "cannot be trained itself: add model.lora"),
        ({}, 3, "set parallel.zero to 0, 1 or 2"),
        ({"lora": {"dora": True}}, 0, "DoRA's norms"),
        ({"quantize": "int4"}, 0, "nf4"),
        ({"quantize": "int8", "dtype": "fp32"}, 0, "set model.dtype: bf16"),
    ],
)
def test_what_cannot_be(config, model, zero, said):
    config["model"] |= model
    config["parallel"] = {"zero": zero}
    with pytest.raises(UserError, match=said):
        configuration.validate(config)


def test_a_layer_that_is_trained_in_full_is_not_quantized(config):
    name = "model.layers.0.mlp.up_proj.weight"
    config["model"]["lora"] = {"r": 4, "targets": "q_proj", "train": [name], "export": "merged"}
    job = jobs.job_of(config)
    assert job.record["lora"]["trained_in_full"] == [name]
    assert job.record["quantize"]["layers"] == 7 * job.model.config.num_hidden_layers - 1
    parameter = job.model.get_parameter(name)
    assert parameter.requires_grad and parameter.dtype == torch.bfloat16


def test_settings_that_changed_are_named(config, tmp_path):
    folder = run(config, tmp_path, "run", 1)
    code, output = launch.fastft(
        "resume", folder, "train.steps=8", "model.quantize={format: nf4, block: 32}", check=False
    )
    assert code == 1 and "block (default), and is block 32" in " ".join(output.split())


def test_another_base_is_refused(config, tmp_path):
    """As a checkpoint's adapter was trained beside other numbers."""
    config["train"]["steps"] = 2
    folder = run(config, tmp_path, "run")
    for change, said in (("int8", "model.quantize was format nf4, and is format int8"), ("null", "this run has LoRA.")):
        arguments = ("resume", folder, f"model.quantize={change}", "train.steps=4")
        code, output = launch.fastft(*arguments, check=False)
        assert code == 1 and said in " ".join(output.split()) and "Traceback" not in output, output[-1500:]


def test_experts_that_stay_whole_are_said(caplog):
    config = transformers.Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
    )
    model = transformers.Qwen2MoeForCausalLM(config)
    settings = configuration.validate(
        {"task": "causal_lm", "model": {"path": "x", "dtype": "bf16", "lora": {"r": 2}, "quantize": "nf4"}}
    )
    Quantize(settings.model.quantize, settings).apply(model, ())
    assert "stay as they are, for they are no linear layers" in caplog.text and "experts" in caplog.text
    assert not is_quantized(model.model.layers[0].mlp.shared_expert_gate)


def test_pairs_are_not_rounded_by_rows(pair_models, tmp_path):
    config = {
        "task": "seq2seq",
        "model": {
            "path": str(pair_models("t5")),
            "lora": {"r": 2},
            "dtype": "fp32",
            "quantize": {"format": "nf4", "calibrate": 2},
        },
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 16, "truncation": "truncate"},
        "train": {"steps": 1},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "offline": True},
    }
    (tmp_path / "rows.jsonl").write_text('{"source": "the cat", "target": "a dog"}\n' * 4)
    with pytest.raises(UserError, match="has an encoder and a decoder"):
        jobs.job_of(config)
