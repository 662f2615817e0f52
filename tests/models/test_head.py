"""The loss taken at the head is the model's own: values, gradients, ZeRO, and nothing else about the model changes."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import launch
from fastft.errors import UserError
from fastft.models import head
from fastft.models.head import FusedHead, HeadError, install
from tests.models.heads import CAUSAL, PAIRS, batch_of, model_of, plain_loss

NAMES = [*CAUSAL, *PAIRS, "lora", "low_rank"]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_the_models_own(name):
    model = model_of(name).eval()
    inputs, target = batch_of(name)
    plain = plain_loss(model, inputs, target)
    expected = gradients(model, plain)
    fused = FusedHead(model).loss(model, inputs, target)
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
    found = gradients(model, fused)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_accepts(name, dtype):
    model = model_of(name, dtype).train()
    found, why = install(model, model, batch_of(name)[0], "auto")
    assert found is not None and why == "automatic" and model.training


def test_labels_of_seq2seq_are_not_shifted():
    """A sequence-to-sequence model's labels are what its decoder predicts at each position: they go in as they are."""
    model = model_of("t5").eval()
    ids, labels = (
        batch_of("t5")[0]["input_ids"],
        torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(3)),
    )
    expected = model(input_ids=ids, labels=labels).loss
    inputs = {"input_ids": ids, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    torch.testing.assert_close(FusedHead(model).loss(model, inputs, labels), expected)


def _unaccounted(model):
    """A model that does something to its logits that fastft does not know of."""
    inner = model.forward

    def forward(**inputs):
        outputs = inner(**inputs)
        outputs.logits = outputs.logits * 1.05
        return outputs

    model.forward = forward


def _head_twice(model):
    inner = model.lm_head
    model.model.register_forward_hook(lambda _m, _i, out: (inner(out.last_hidden_state), out)[1])


class _Odd(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return torch.tanh(self.inner(hidden))


REFUSALS = {
    "an unknown factor": (_unaccounted, "differ from those of the model's logits"),
    "a head called twice": (_head_twice, "called 2 times"),
    "another kind of head": (lambda model: setattr(model, "lm_head", _Odd(model.lm_head)), "is a _Odd, not a Linear"),
    "no head": (lambda model: setattr(model, "get_output_embeddings", lambda: None), "no output embeddings"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_falls_back_or_is_refused(case):
    change, reason = REFUSALS[case]
    model = model_of("llama")
    change(model)
    inputs = batch_of("llama")[0]
    before = model(**inputs).logits
    found, why = install(model, model, inputs, "auto")
    assert found is None and reason in why
    with pytest.raises(UserError, match=reason):
        install(model, model, inputs, "linear_cross_entropy")
    assert torch.equal(model(**inputs).logits, before)  # and the model is as it was


@pytest.mark.parametrize("attribute", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_the_check_notices_every_step_that_is_left_out(attribute, monkeypatch):
    name = {"final_logit_softcapping": "gemma2", "logits_scaling": "granite", "logit_scale": "cohere"}[attribute]
    monkeypatch.setattr(head, "post_processing", lambda model: {})
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CAUSAL[name](), dtype=dtype)  # as drawn: tiny logits
        found, why = install(model, model, batch_of(name)[0], "auto")
        assert found is None and "differ" in why


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "t5", "lora", "low_rank"])
def test_everything_else_is_unchanged(name, tmp_path):
    model = model_of(name).eval()
    inputs, target = batch_of(name)
    ids = inputs["input_ids"]
    before = model(**inputs).logits, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    keys, kind = list(model.state_dict()), type(model.get_output_embeddings())
    fused = FusedHead(model)
    assert torch.equal(model(**inputs).logits, before[0])
    fused.loss(model, inputs, target).backward()
    with pytest.raises(IndexError, match="target 97"):
        fused.loss(model, inputs, torch.full_like(target, 97))  # an error leaves no targets behind
    assert torch.equal(model(**inputs).logits, before[0])
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), before[1])
    assert list(model.state_dict()) == keys and type(model.get_output_embeddings()) is kind
    if name in ("llama_tied", "gemma2", "t5"):
        assert isinstance(model.get_output_embeddings(), nn.Linear)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(again(**inputs).logits, before[0])
        tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    fused.remove()
    assert "forward" not in vars(model.get_output_embeddings())


def test_gradients_only_as_needed():
    """A frozen head: its weight gets no gradient, what is below it does."""
    model = model_of("llama").eval()
    model.lm_head.weight.requires_grad_(False)
    inputs, target = batch_of("llama")
    expected = gradients(model, plain_loss(model, inputs, target))
    found = gradients(model, FusedHead(model).loss(model, inputs, target))
    assert found.keys() == expected.keys() and "lm_head.weight" not in found


def test_no_logits_are_made():
    """The vocabulary's dimension appears in no output of the head."""
    model = model_of("llama").eval()
    inputs, target = batch_of("llama")
    shapes = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    FusedHead(model).loss(model, inputs, target)
    assert shapes == [(1, 1, 1)]


def test_targets_of_another_shape_are_an_error():
    model = model_of("llama")
    inputs, target = batch_of("llama")
    with pytest.raises(HeadError, match=r"targets are \(2, 10\)"):
        FusedHead(model).loss(model, inputs, target[:, 1:])


def test_lora_disabled_and_merged():
    model = model_of("lora").eval()
    inputs, target = batch_of("lora")
    fused = FusedHead(model)
    with model.disable_adapter():
        torch.testing.assert_close(fused.loss(model, inputs, target), plain_loss(model, inputs, target))
    with_adapter = plain_loss(model, inputs, target)
    model.merge_adapter()
    torch.testing.assert_close(fused.loss(model, inputs, target), with_adapter)


def test_zero_0_to_3_on_two_ranks(tmp_path):
    """Tied, PEFT's LoRA and a hand-written low-rank head: three AdamW steps give the plain path's losses."""
    launch.ranks(2, [launch.ROOT / "tests" / "models" / "heads.py", tmp_path / "losses.json"])
    found = json.loads((tmp_path / "losses.json").read_text())
    for name, runs in found.items():
        assert runs["plain"][0] > runs["plain"][-1], name
        for stage in range(4):
            assert np.allclose(runs[f"zero{stage}"], runs["plain"], rtol=2e-5, atol=0), (name, stage, runs)


@pytest.mark.parametrize("implementation", ["auto", "linear_cross_entropy", "cross_entropy"])
def test_a_run_records_what_it_used(lm_config, tmp_path, implementation):
    config = copy.deepcopy(lm_config)
    config["loss"] = {"implementation": implementation}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", config))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    used = records[0]["loss"]["implementation"]
    assert used == ("cross_entropy" if implementation == "cross_entropy" else "linear_cross_entropy")
    chosen = {c["op"] for r in records if r["kind"] == "backends" for c in r["chosen"]}
    assert used in chosen
