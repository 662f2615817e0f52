"""What is tried on a model before training: positions, padding, causality, lengths that it cannot take."""

import json

import jobs
import numpy as np
import pytest
import torch
import transformers

from fastft.errors import UserError
from fastft.models import load
from fastft.models.isolation import check_causality
from fastft.models.trial import check_runs

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
OFFSET = ("Roberta", "CamembertConfig", "XLMRoberta", "MPNet", "Data2VecText", "RobertaPreLayerNorm", "IBert", "Xmod")
OFFSET += ("XLMRobertaXL", "Longformer", "Esm")
MORE = {
    "Xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "Longformer": {"attention_window": 8},
    "Esm": {"position_embedding_type": "absolute", "mask_token_id": 3},
}


@pytest.mark.parametrize("family", [name.removesuffix("Config") for name in OFFSET])
def test_positions_that_begin_behind_padding(family):
    """The longest row that length_limit allows runs; one token more does not."""
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **special, **MORE.get(family, {})})
    assert load.position_offset(config) == 2 and load.length_limit(config) == 62
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.full((1, 62), 7)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", ["Bert", "Electra", "DistilBert", "OPT", "GPT2", "Llama"])
def test_positions_that_begin_at_zero(family):
    config = getattr(transformers, f"{family}Config")(vocab_size=64, pad_token_id=1)
    assert load.position_offset(config) == 0


def test_an_encoder_is_not_causal():
    config = transformers.BertConfig(**SMALL)
    model = transformers.BertLMHeadModel(config)
    with pytest.raises(UserError, match=r"BertLMHeadModel is not causal(.|\n)*is_decoder"):
        check_causality(model, model, 16, CPU)
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True))
    check_causality(decoder, decoder, 16, CPU)


def test_a_length_that_a_model_cannot_take_and_one_that_it_can():
    config = transformers.NystromformerConfig(**SMALL, num_landmarks=8, segment_means_seq_len=64)
    model = transformers.NystromformerForSequenceClassification(config)
    before = torch.get_rng_state()

    def inputs(n):
        return {"input_ids": torch.full((1, n), 7)}

    with pytest.raises(UserError, match=r"batch.pad_to_multiple_of: 64"):
        check_runs(model, model, inputs, 5, 64, CPU)
    check_runs(model, model, inputs, 64, 64, CPU)
    assert torch.equal(before, torch.get_rng_state()), "training goes on with the random numbers that it would have had"


def folder_of(tmp_path, corpus, model, **options):
    from conftest import _tokenizer

    tokenizer = _tokenizer(corpus, tmp_path)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path)
    if options:
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    return str(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "xlnet"])
def test_a_text_is_read_alike_alone_and_in_a_batch(classification_config, corpus, tmp_path, family):
    """A decoder whose tokenizer pads on the left; XLNet, whose head reads the last position, padding or not."""
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3, "num_labels": 3}
        model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(vocab_size=512, **sizes))
    else:
        sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.3, "num_labels": 3}
        model = transformers.XLNetForSequenceClassification(transformers.XLNetConfig(vocab_size=512, **sizes))
    classification_config["model"]["path"] = folder_of(tmp_path / "m", corpus, model, padding_side="left")
    job = jobs.job_of(classification_config)
    texts = ["one", "two and some more of it than in the first", "three"]

    def logits(*some):
        inputs, _ = job.task.encode_texts(list(some), [None] * len(some), 32)
        with torch.no_grad():
            return job.model(**inputs).logits

    torch.testing.assert_close(logits(*texts), torch.cat([logits(text) for text in texts]), atol=1e-4, rtol=1e-4)
    rows = [np.asarray(job.task.tokenizer(text)["input_ids"]) for text in texts]
    with torch.no_grad():
        trained = job.model(**job.task.padded_inputs(rows, None)).logits  # as collate pads
    torch.testing.assert_close(trained, logits(*texts))


def test_a_head_of_another_size(classification_config, corpus, tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=5))
    classification_config["model"]["path"] = folder_of(tmp_path / "m", corpus, model)
    with pytest.raises(UserError, match=r"a head with 5 outputs, the data needs 3(.|\n)*model.new_head: true"):
        jobs.job_of(classification_config)
    classification_config["model"]["new_head"] = True
    job = jobs.job_of(classification_config)
    assert job.initialized == ["classifier.bias", "classifier.weight"]
    assert job.model.classifier.weight.std() > 0.01 and not job.model.classifier.bias.any()


def test_a_new_head_of_the_same_size(classification_config, corpus, tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))
    classification_config["model"] |= {"path": folder_of(tmp_path / "m", corpus, model), "new_head": True}
    job = jobs.job_of(classification_config)
    assert not torch.equal(job.model.classifier.weight, model.classifier.weight)
    assert torch.equal(job.model.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert torch.equal(job.model.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_token_without_a_row(classification_config, lm_config, corpus, tmp_path, task):
    config = classification_config if task == "classification" else lm_config
    path = config["model"]["path"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<url>"])
    tokenizer.save_pretrained(tmp_path / "tok")
    config["model"]["tokenizer"] = str(tmp_path / "tok")
    with pytest.raises(UserError, match=r"none for '<url>'(.|\n)*model.resize_embeddings"):
        jobs.job_of(config)
    config["model"]["resize_embeddings"] = True
    assert jobs.job_of(config).model.get_input_embeddings().weight.shape[0] == 513


def test_checkpointing_that_a_model_does_not_have(lm_config, corpus, tmp_path):
    from fastft import assemble

    sizes = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))
    lm_config["model"]["path"] = folder_of(tmp_path / "m", corpus, model)
    lm_config |= {"parallel": {"activation_checkpointing": True}}
    lm_config["data"]["packing"] = "none"
    job = jobs.job_of(lm_config)
    with pytest.raises(UserError, match="activation_checkpointing: OpenAIGPTLMHeadModel does not support it"):
        assemble.add_optimizer(job)
