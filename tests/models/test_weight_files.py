"""Weights into safetensors files one by one: what transformers' save_pretrained would have written."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastft.errors import UserError
from fastft.models import weight_files

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SMALL | {"intermediate_size": 32}
PAIR = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
EXPERTS = WIDE | {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
QWEN2_MOE = WIDE | {
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, WIDE),
    "llama, tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig, WIDE | {"tie_word_embeddings": True}),
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, WIDE),
    "bert, masked": (transformers.BertForMaskedLM, transformers.BertConfig, WIDE),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {"vocab_size": 64, "n_embd": 16, "n_layer": 1}),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, T5),
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig, PAIR),
    "marian": (transformers.MarianMTModel, transformers.MarianConfig, PAIR | {"pad_token_id": 1}),
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, EXPERTS),
    "qwen2_moe": (transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig, QWEN2_MOE),
}


def made(name: str) -> torch.nn.Module:
    kind, config, settings = MODELS[name]
    heads = {"n_head": 2} if name == "gpt2" else {}
    torch.manual_seed(0)
    return kind(config(**settings, **heads))


@pytest.mark.parametrize("limit", [weight_files.LIMIT, 5000])
@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_transformers(tmp_path, monkeypatch, name, limit):
    """The same names and numbers, each tied weight once; in one file or in several; read by transformers."""
    monkeypatch.setattr(weight_files, "LIMIT", limit)
    model, folder = made(name), tmp_path / "ours"
    model.save_pretrained(tmp_path / "theirs")
    layout = weight_files.Layout.of(model)
    state = model.state_dict()
    model.save_pretrained(folder, state_dict={})
    weight_files.write(folder, layout, state, {n: t.dtype for n, t in state.items()}, folder)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) == 1) == (limit > 5000)
    ours = {n: t for file in files for n, t in load_file(file).items()}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())
    if len(files) > 1:
        index = json.loads((folder / weight_files.INDEX).read_text())
        assert index["weight_map"].keys() == ours.keys()
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in state.items())


def test_names_that_files_spell_otherwise(tmp_path):
    """A model that was read from a folder without its prefix, or with the names of old, is written with them."""
    base = transformers.BertModel(transformers.BertConfig(**WIDE))
    base.save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "theirs")
    files = weight_files.Layout.of(model).files
    assert {name for part in files.values() for name in part} == set(load_file(tmp_path / "theirs/model.safetensors"))


def test_weights_that_are_no_numbers(tmp_path):
    with pytest.raises(UserError, match="there: not written: a holds NaN or Inf"):
        layout = weight_files.Layout(None, {"a": {"a": (2,)}}, set())
        weight_files.write(tmp_path, layout, {"a": torch.tensor([1.0, float("inf")])}, {"a": torch.float32}, "there")
