"""Depths of real families' parameters, made tiny."""

import pytest
import torch
import transformers

from fastft.errors import UserError
from fastft.models.depth import depths

SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
CLASSIFIER = transformers.AutoModelForSequenceClassification
LM = transformers.AutoModelForCausalLM
SEQ2SEQ = transformers.AutoModelForSeq2SeqLM


def model(kind, auto, **settings):
    return auto.from_config(getattr(transformers, kind)(**settings))


DISTIL = {"vocab_size": 40, "dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 8}
GPT2 = {"vocab_size": 40, "n_embd": 8, "n_layer": 3, "n_head": 2}
T5 = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 3, "num_heads": 2}
BART = {"vocab_size": 40, "d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}  # fmt: skip
OPT = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 8,
       "word_embed_proj_dim": 4}  # fmt: skip
CASES = [
    ("BertConfig", CLASSIFIER, SMALL, {
        "bert.embeddings.word_embeddings.weight": 0, "bert.embeddings.LayerNorm.weight": 0,
        "bert.encoder.layer.0.attention.self.query.weight": 1, "bert.encoder.layer.2.output.LayerNorm.bias": 3,
        "bert.pooler.dense.weight": 4, "classifier.weight": 4}),
    ("DistilBertConfig", CLASSIFIER, DISTIL, {
        "distilbert.embeddings.position_embeddings.weight": 0, "distilbert.transformer.layer.1.ffn.lin1.weight": 2,
        "pre_classifier.weight": 4, "classifier.bias": 4}),
    ("RobertaConfig", CLASSIFIER, SMALL, {
        "roberta.embeddings.LayerNorm.bias": 0, "roberta.encoder.layer.2.output.dense.weight": 3,
        "classifier.dense.weight": 4, "classifier.out_proj.bias": 4}),
    ("LlamaConfig", LM, {**SMALL, "tie_word_embeddings": False}, {
        "model.embed_tokens.weight": 0, "model.layers.0.input_layernorm.weight": 1,
        "model.layers.2.mlp.up_proj.weight": 3, "model.norm.weight": 4, "lm_head.weight": 4}),
    ("LlamaConfig", CLASSIFIER, SMALL, {"model.embed_tokens.weight": 0, "score.weight": 4}),
    ("GPT2Config", LM, GPT2, {  # tied: the head's matrix is the embedding's, the lowest
        "transformer.wte.weight": 0, "transformer.wpe.weight": 0, "transformer.h.1.mlp.c_fc.weight": 2,
        "transformer.ln_f.bias": 4}),
    ("T5Config", SEQ2SEQ, T5, {
        "shared.weight": 0, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 1,
        "encoder.final_layer_norm.weight": 4, "decoder.block.2.layer.2.DenseReluDense.wi.weight": 3}),
    ("BartConfig", SEQ2SEQ, BART, {  # of two stacks the last layers are at one depth
        "model.encoder.embed_positions.weight": 0, "model.decoder.layernorm_embedding.weight": 0,
        "model.encoder.layers.0.fc1.weight": 1, "model.decoder.layers.0.fc1.weight": 2,
        "model.decoder.layers.1.fc1.bias": 3}),
    ("OPTConfig", LM, OPT, {
        "model.decoder.project_in.weight": 0, "model.decoder.project_out.weight": 4,
        "model.decoder.final_layer_norm.weight": 4, "model.decoder.layers.0.fc1.weight": 1}),
]  # fmt: skip


@pytest.mark.parametrize("kind, auto, settings, expected", CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_depths(kind, auto, settings, expected):
    built = model(kind, auto, **settings)
    found = depths(built)
    assert found.top == 4 and set(found.of) == {name for name, _ in built.named_parameters()}
    assert {name: found.of[name] for name in expected} == expected
    assert all(depth in range(1, 4) for name, depth in found.of.items() if any(p.isdigit() for p in name.split(".")))


def test_the_same_after_lora():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2)
    found = depths(peft.get_peft_model(model("LlamaConfig", LM, **SMALL), settings))
    assert sorted(set(found.of.values())) == [1, 2, 3] and all("lora_" in name for name in found.of)


def test_what_has_no_depth_is_refused():
    with pytest.raises(UserError, match=r"Albert.*runs 3 layers with the parameters of 1"):
        depths(model("AlbertConfig", CLASSIFIER, **SMALL, embedding_size=4))
    shared = model("LlamaConfig", LM, **SMALL)
    shared.model.layers[2] = shared.model.layers[0]
    with pytest.raises(UserError, match=r"model.layers.0.* is used in layers 0, 2"):
        depths(shared)
    with pytest.raises(UserError, match="has no list of layers"):
        depths(torch.nn.Sequential(torch.nn.Linear(2, 2)))
