"""Encoders without padding: the same logits, gradients and losses as with it."""

import numpy as np
import pytest
import torch
import transformers

from fastft.models import unpadded

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}
DISTIL = {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "vocab_size": 64, "attention_dropout": 0.0}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTHS = (3, 11, 11, 1, 7)
CPU = torch.device("cpu")


def batch(lengths=LENGTHS, side: str = "right") -> dict:
    width = max(lengths) + 2
    mask = np.zeros((len(lengths), width), np.int64)
    for row, n in zip(mask, lengths, strict=True):
        row[width - n if side == "left" else 0 : width if side == "left" else n] = 1
    tokens = np.random.default_rng(0).integers(5, 60, mask.shape) * mask
    given = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
    return {**given, **unpadded.positions(mask - 1)}


def built(family: str, head: str, **changes):
    torch.manual_seed(0)
    quiet = (
        {"dropout": 0.0, "seq_classif_dropout": 0.0, **DISTIL}
        if family == "DistilBert"
        else {**SIZES, **QUIET, "pad_token_id": 0}
    )
    config = getattr(transformers, f"{family}Config")(**{**quiet, **changes})
    return getattr(transformers, f"{family}{head}")(config)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert", "XLMRoberta", "Camembert"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
def test_same_logits_and_gradients(family, head):
    model = built(family, head).double().train()
    given = batch()
    found, why = unpadded.install(model, model, "auto", given, CPU)
    assert found is not None, why
    seen = []

    def watch(module, args, kwargs) -> None:
        seen.append((args or (kwargs["hidden_states"],))[0].shape)

    unpadded.stack_of(model).register_forward_pre_hook(watch, with_kwargs=True)

    def run() -> tuple:
        model.zero_grad()
        logits = model(**given).logits
        if head != "ForSequenceClassification":
            logits = logits.flatten(0, 1)[given["rows_at"]]
        logits.square().sum().backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    logits, grads = run()
    assert seen[-1][:2] == (1, sum(LENGTHS))  # nothing else went through the layers
    with found.off():
        expected, others = run()
    assert seen[-1][:2] == given["input_ids"].shape
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-8, atol=1e-10, msg=name)


def test_padding_on_the_left():
    model = built("Bert", "ForTokenClassification").double().eval()
    given = batch(side="left")
    found, why = unpadded.install(model, model, "auto", given, CPU)
    assert found is not None, why
    with found.off():
        expected = model(**given).logits
    at = given["rows_at"]
    torch.testing.assert_close(model(**given).logits.flatten(0, 1)[at], expected.flatten(0, 1)[at])


def test_places_of_documents():
    """Two documents in the first row, padding, one in the second."""
    places = unpadded.positions(np.array([[0, 0, 1, 1, 1, -1], [0, 0, 0, 0, -1, -1]]))
    assert places["rows_at"].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert places["cu_seq_lens_q"].tolist() == [0, 2, 5, 9] and places["cu_seq_lens_q"].dtype == torch.int32
    assert places["max_length_q"] == 4
    nothing = unpadded.positions(np.full((1, 3), -1))  # of a rank without rows
    assert nothing["rows_at"].tolist() == [0] and nothing["cu_seq_lens_q"].tolist() == [0, 1]


def test_dropout_is_drawn_and_gone_in_evaluation():
    model = built("Bert", "ForSequenceClassification", attention_probs_dropout_prob=0.5)
    given = batch()
    found, why = unpadded.install(model, model, "auto", given, CPU)
    assert found is not None, why
    model.train()
    one, other = model(**given).logits, model(**given).logits
    assert not torch.equal(one, other)
    model.eval()
    torch.testing.assert_close(model(**given).logits, model(**given).logits, rtol=0, atol=0)


def test_gradient_checkpointing():
    model = built("Bert", "ForSequenceClassification").double().train()
    given = batch()
    assert unpadded.install(model, model, "auto", given, CPU)[0]
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def deberta():
    config = transformers.DebertaV2Config(**SIZES, relative_attention=True, pad_token_id=0)
    return transformers.DebertaV2ForSequenceClassification(config)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: built("Llama", "ForSequenceClassification", num_labels=2), "in one module"),
        (deberta, "positions are relative"),
        (lambda: transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**SIZES)), "are relative"),
        (lambda: built("Bert", "LMHeadModel", is_decoder=True), "no encoder"),
    ],
)
def test_other_models_run_as_before(make, reason):
    model = make().eval()
    found, why = unpadded.install(model, model, "auto", batch(), CPU)
    assert found is None and reason in why
    given = {name: value for name, value in batch().items() if name not in unpadded.KEYS}
    assert model(**given).logits.isfinite().all()


def test_a_head_that_needs_the_mask_is_refused():
    """Its own mean over real tokens: without the mask it would be another model."""

    class Mean(transformers.BertForTokenClassification):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            out = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
            weight = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            out.logits = (out.logits * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
            return out

    torch.manual_seed(0)
    model = Mean(transformers.BertConfig(**SIZES, **QUIET))
    found, why = unpadded.install(model, model, "auto", batch(), CPU)
    assert found is None and "logits differ" in why
    assert model.config._attn_implementation != unpadded.NAME
