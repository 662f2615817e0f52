"""LoRA and DoRA: in place, at every ZeRO stage, adapter-only checkpoints, exports that peft and transformers read."""

import json
import shutil
from pathlib import Path

import jobs
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import launch
from fastft import assemble, track
from fastft.errors import UserError


@pytest.fixture
def lora_config(lm_config) -> dict:
    lm_config["model"]["lora"] = {"r": 4}
    lm_config["optim"]["lr"] = 1e-2
    return lm_config


def run(config: dict, path: Path, name: str, ranks: int = 1, **changes) -> Path:
    config = json.loads(json.dumps(config))
    config["run"]["dir"] = str(path / name)
    config["data"]["cache"] = str(path / "prepared")
    for key, value in changes.items():
        section, field = key.split("__")
        config.setdefault(section, {})[field] = value
    launch.ranks(ranks, ["-m", "fastft", "train", launch.write_config(path / f"{name}.yaml", config)])
    return path / name


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in track.read(run) if r["kind"] == "train"]


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.long), "bf16"])
def test_every_stage_learns_the_same(lora_config, tmp_path, dtype):
    """On two ranks; the base does not move, its weights are in no checkpoint, and every adapter moves."""
    lora_config["model"]["dtype"] = dtype
    lora_config["train"]["steps"] = 6
    model = transformers.AutoModelForCausalLM.from_pretrained(lora_config["model"]["path"])
    model.config.attention_dropout = 0.0
    base = tmp_path / "base"
    model.save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(lora_config["model"]["path"]).save_pretrained(base)
    lora_config["model"]["path"] = str(base)
    runs = [run(lora_config, tmp_path, f"zero{z}", 2, parallel__zero=z) for z in range(4)]
    first = losses(runs[0])
    assert first[-1] < first[0] - 0.05
    for other in runs[1:]:
        assert losses(other) == pytest.approx(first, rel=2e-5 if dtype == "fp32" else 5e-3)
    for folder in runs:
        adapter = load_file(folder / "model" / "adapter_model.safetensors")
        assert not (folder / "model" / "model.safetensors").exists()
        assert all(t.any() for name, t in adapter.items() if "lora_B" in name) and len(adapter) == 28
        size = sum(f.stat().st_size for f in (folder / "checkpoints" / "step-6").rglob("*.safetensors"))
        assert size < 1.2e6, size  # the base alone has 0.4 MB in fp32 on each of two ranks, with Adam 1.6 MB


@pytest.mark.parametrize("zero, ranks", [(0, 1), pytest.param(2, 2, marks=pytest.mark.long), (3, 2)])
def test_resume_is_bit_exact(lora_config, tmp_path, zero, ranks):
    lora_config["train"]["steps"] = 6
    lora_config["checkpoint"] = {"every": 3, "keep": 9}
    whole = run(lora_config, tmp_path, "whole", ranks, parallel__zero=zero)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-6")
    shutil.rmtree(resumed / "model")
    launch.ranks(ranks, ["-m", "fastft", "resume", resumed])
    assert losses(resumed) == losses(whole)
    a, b = (load_file(r / "model" / "adapter_model.safetensors") for r in (whole, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module", params=["lora", "dora"])
def trained(request, tmp_path_factory, corpus, tiny_llama) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    base = path / "base"
    shutil.copytree(tiny_llama, base)
    config = {
        "task": "causal_lm",
        "model": {"path": str(base), "lora": {"r": 4, "dora": request.param == "dora"}},
        "data": {"train": str(corpus / "train.jsonl"), "eval": str(corpus / "eval.jsonl"), "max_length": 64},
        "batch": {"size": 6},
        "optim": {"lr": 1e-2},
        "train": {"steps": 5},
        "run": {"offline": True, "device": "cpu", "threads": 1},
    }
    config["data"]["truncation"] = "split"
    return run(config, path, "run", 1, parallel__zero=0)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None]).logits


def test_exports_agree(trained, tmp_path):
    """The run's adapter through peft, through fastft, and merged: the same logits; eval and predict take it."""
    base = transformers.AutoModelForCausalLM.from_pretrained(trained.parent / "base")
    before = logits(base)
    by_peft = logits(peft.PeftModel.from_pretrained(base, trained / "model"))
    ours = logits(assemble.trained(str(trained)).model)
    launch.fastft("export", trained, tmp_path / "merged", "--merge")
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (by_peft - before).abs().max() > 0.05
    assert torch.allclose(ours, by_peft, atol=1e-5) and torch.allclose(merged, by_peft, atol=1e-4)
    launch.fastft("export", trained, tmp_path / "adapter")
    again = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = load_file(trained / "model" / "adapter_model.safetensors")
    assert all(torch.equal(again[k], first[k]) for k in first)
    _, output = launch.fastft("eval", trained, "--json")
    found = json.loads(output.splitlines()[-1])["eval"]["loss"]
    expected = [r["loss"] for r in track.read(trained) if r["kind"] == "eval"][-1]
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_rounds_and_what_did_not_move_is_said(lora_config, tmp_path):
    """bf16: the rounding of a merge is reported; adapters that learned nothing are named."""
    lora_config["model"]["dtype"] = "bf16"
    lora_config["optim"]["lr"] = 1e-45  # nothing is left of it in bf16
    lora_config["train"]["steps"] = 1
    path = launch.write_config(tmp_path / "c.yaml", lora_config)
    _, output = launch.fastft("train", path)
    assert "LoRA: 14 of 14 adapters did not move" in output
    _, output = launch.fastft("export", lora_config["run"]["dir"], tmp_path / "merged", "--merge")
    assert "rounding moves a layer's output by up to" in output
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_another_base_is_refused(trained, tmp_path):
    """A base whose weights changed since: by resume, and by whoever opens the adapter."""
    copy = tmp_path / "copy"
    shutil.copytree(trained.parent, copy)
    for file in [*copy.rglob("adapter_config.json"), *copy.rglob("config.yaml")]:
        file.write_text(file.read_text().replace(str(trained.parent), str(copy)))
    model = transformers.AutoModelForCausalLM.from_pretrained(copy / "base")
    model.model.embed_tokens.weight.data[0] += 1
    model.save_pretrained(copy / "base")
    for verb in (["resume", copy / "run", "train.steps=7"], ["predict", copy / "run", "--text", "The class"]):
        code, output = launch.fastft(*verb, check=False)
        assert code == 1 and "holds other weights than the adapter was trained on" in output, output


def test_a_classifier_trains_its_head_in_full(classification_config, tmp_path):
    classification_config["model"]["lora"] = {"r": 4, "targets": ["query", "value"]}
    classification_config["optim"]["lr"] = 1e-2
    classification_config["train"] = {"epochs": 6}
    folder = run(classification_config, tmp_path, "run")
    record = next(r for r in track.read(folder) if r["kind"] == "run")
    assert record["lora"]["modules"] == 4 and "classifier.weight" in record["lora"]["trained_in_full"]
    _, output = launch.fastft("eval", folder, "--json")
    assert json.loads(output.splitlines()[-1])["test"]["accuracy"] == 1.0
    names = {f"LABEL_{i}": name for i, name in enumerate("abc")}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        classification_config["model"]["path"], num_labels=3
    )
    model = peft.PeftModel.from_pretrained(base, folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    _, output = launch.fastft("predict", folder, "--text", "bear number 3")
    with torch.no_grad():
        scores = model(**tokenizer("bear number 3", return_tensors="pt")).logits.softmax(-1)[0]
    found = json.loads(output.splitlines()[-1])["scores"]
    assert {names[f"LABEL_{i}"]: pytest.approx(float(p), abs=1e-4) for i, p in enumerate(scores)} == found


def test_checkpointed_activations_reach_every_adapter(lora_config):
    """Frozen embeddings put out nothing that needs a gradient; the adapters get theirs all the same."""
    lora_config["parallel"] = {"activation_checkpointing": True}
    job = jobs.job_of(lora_config)
    assemble.add_optimizer(job)
    job.model.train()
    jobs.loss_of(job, jobs.batch_of(job, [0, 1])).backward()
    trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all(p.grad is not None for p in trained.values())
    assert all(p.grad.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)


def test_gpt2_whose_linear_layers_are_transposed(lora_config, corpus, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(lora_config["model"]["path"])
    config = transformers.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    lora_config["model"]["path"] = str(tmp_path / "gpt2")
    lora_config["train"]["steps"] = 3
    folder = run(lora_config, tmp_path, "run")
    launch.fastft("export", folder, tmp_path / "merged", "--merge")
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(merged, logits(assemble.trained(str(folder)).model), atol=1e-4)


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"targets": ["q_porj"]}, "'q_porj' matches no linear layer.\nDid you mean 'q_proj'?"),
        ({"train": ["nothing.*"]}, "'nothing.*' matches no parameter"),
        ({"targets": []}, "no module is named"),
        ({"targets": ["q_proj", "embed_tokens"]}, "'embed_tokens' matches no linear layer"),
        ({"train": ["model.norm.weight"], "targets": ["norm"]}, "'norm' matches no linear layer"),
        ({"rank": 3}, "model.lora.rank: unknown key"),
        ({"r": 0}, "model.lora.r"),
    ],
)
def test_mistakes(lora_config, lora, message):
    lora_config["model"]["lora"] = lora
    with pytest.raises(UserError) as e:
        jobs.job_of(lora_config)
    assert message in str(e.value)


def test_tied_weights_trained_in_full(lora_config, tiny_llama, tmp_path):
    """peft's files cannot say that two weights are one: refused as an adapter; merged, they stay one."""
    config = transformers.AutoConfig.from_pretrained(tiny_llama)
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "tied")
    lora_config["model"] = {"path": str(tmp_path / "tied"), "lora": {"train": ["model.embed_tokens.weight"]}}
    with pytest.raises(UserError, match="is tied to another weight"):
        jobs.job_of(lora_config)
    lora_config["model"]["lora"]["export"] = "merged"
    lora_config["train"]["steps"] = 2
    folder = run(lora_config, tmp_path, "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_an_adapter_needs_weights_that_are_somewhere(lora_config, classification_config, tmp_path):
    """No base of random weights; no adapter on a head, which is trained in full; no adapter's folder as a base."""
    lora_config["model"]["init"] = "random"
    with pytest.raises(UserError, match="beside weights that are nowhere"):
        jobs.job_of(lora_config)
    classification_config["model"]["lora"] = {"targets": ["classifier", "query"]}
    with pytest.raises(UserError, match="classifier is a part of the task's head"):
        jobs.job_of(classification_config)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    classification_config["model"] = {
        "path": str(tmp_path / "adapter"),
        "tokenizer": classification_config["model"]["path"],
    }
    shutil.copy(Path(classification_config["model"]["tokenizer"]) / "config.json", tmp_path / "adapter")
    with pytest.raises(UserError, match="holds an adapter, not a whole model"):
        jobs.job_of(classification_config)


def test_what_a_part_of_a_module_is_goes_into_a_merged_model_only(classification_config):
    classification_config["model"]["lora"] = {"targets": ["value"], "train": ["*attention.output.LayerNorm.weight"]}
    with pytest.raises(UserError, match="only a part of a module"):
        jobs.job_of(classification_config)
    classification_config["model"]["lora"]["export"] = "merged"
    job = jobs.job_of(classification_config)
    assert job.model.bert.encoder.layer[0].attention.output.LayerNorm.weight.requires_grad


def test_names_of_the_model_are_frozen(classification_config):
    """model.freeze goes by the names that the model has without adapters; a frozen head stays frozen."""
    classification_config["model"] |= {"lora": {"r": 2}, "freeze": ["*query.weight", "classifier.bias"]}
    job = jobs.job_of(classification_config)
    assert not job.model.classifier.bias.requires_grad and job.model.classifier.weight.requires_grad


def test_a_resume_computes_what_it_did(trained, tmp_path):
    """Another alpha would scale what was learned."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    code, output = launch.fastft("resume", copy, "train.steps=7", "model.lora.alpha=64", check=False)
    assert code == 1 and "model.lora.alpha was None, and is 64" in output


def test_export_of_a_run_with_early_stopping_is_the_best(lora_config, tmp_path):
    lora_config["optim"] |= {"lr": 30.0, "schedule": "constant"}  # it gets worse soon
    lora_config["train"] = {"steps": 12, "eval_every": 2, "early_stopping": {"metric": "eval.loss", "patience": 2}}
    folder = run(lora_config, tmp_path, "run")
    end = track.read(folder)[-1]
    assert end["exported_step"] < end["step"]
    _, output = launch.fastft("export", folder, tmp_path / "again")
    assert f"the best checkpoint is exported: step {end['exported_step']}" in output
    first, again = (load_file(f / "adapter_model.safetensors") for f in (folder / "model", tmp_path / "again"))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_tied_head_with_an_adapter_is_another_weight(lora_config, tiny_llama, tmp_path):
    config = transformers.AutoConfig.from_pretrained(tiny_llama)
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "tied")
    lora = {"targets": ["q_proj", "lm_head"], "export": "merged"}
    lora_config["model"] = {"path": str(tmp_path / "tied"), "lora": lora}
    folder = run(lora_config, tmp_path, "run")
    assert not json.loads((folder / "model" / "config.json").read_text())["tie_word_embeddings"]
    found = load_file(folder / "model" / "model.safetensors")
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


class Asked(dict):
    """A state that counts how often each weight is asked for."""

    def __init__(self, state):
        super().__init__(state)
        self.times = dict.fromkeys(state, 0)

    def __getitem__(self, name):
        self.times[name] += 1
        return super().__getitem__(name)


def test_exports_ask_for_one_weight_at_a_time(lora_config, tmp_path):
    """An adapter is written without the base; a merged model takes every weight of the base once."""
    from fastft.train import export

    job = jobs.job_of(lora_config)
    state = Asked(job.model.state_dict())
    export.save(job, state, tmp_path / "adapter", "fp32")
    assert not any(times for name, times in state.times.items() if "lora_" not in name)
    state = Asked(job.model.state_dict())
    export.save(job, state, tmp_path / "merged", "fp32", merge=True)
    assert {times for name, times in state.times.items() if "lora_" not in name} == {1}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain), logits(job.model)), "every lora_B is zeros"
