"""Attention by document and fused decoder layers in the user's model: proven on it, or left out with the reason."""

import copy

import jobs
import pytest
import torch
import transformers

import launch
from fastft import track
from fastft.errors import UserError
from fastft.models import documents, layers, parts
from fastft.ops import cpu as processor
from fastft.ops.decoder import attention
from tests.ops.common import NATIVE_BUILT

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
CPU = torch.device("cpu")


def model_of(name: str, dtype: torch.dtype = torch.float32, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    given = {**sizes, "num_hidden_layers": 4, "vocab_size": 99, **tokens, **more}
    config = getattr(transformers, f"{name}Config")(**given)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def put_into(model, length: int = 64) -> tuple[documents.ByDocument, str]:
    found, _ = documents.install(model, model, "varlen", length, CPU)
    return found, layers.install(model, model, found, length, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(dtype):
    for name, more, done in (
        ("Llama", {}, "fused: 4 layers of LlamaDecoderLayer"),
        ("Qwen2", {}, "fused: 4 layers"),
        ("Mistral", {"sliding_window": 6}, "fused: 4 layers"),
        ("Granite", {"residual_multiplier": 1.0}, "fused: 4 layers"),
        ("Granite", {"residual_multiplier": 0.5}, "GraniteDecoderLayer 0: output: an error of"),
        ("SmolLM3", {}, "SmolLM3DecoderLayer 3: "),  # without rotation, as every fourth
        ("Gemma", {}, "GemmaDecoderLayer 0: output: an error of"),  # its norm multiplies by 1 + weight
        ("Qwen3", {"head_dim": 12}, "Qwen3DecoderLayer: self_attn.k_norm is not known"),
        ("Phi3", {}, "self_attn.k_proj is not there"),
        (
            "SeedOss",
            {"head_dim": 12, "attention_dropout": 0.0, "residual_dropout": 0.5},
            "SeedOssDecoderLayer 0: it draws random numbers",
        ),
        ("SeedOss", {"head_dim": 12, "attention_dropout": 0.0, "residual_dropout": 0.0}, "fused: 4 layers"),
        ("Cohere", {}, "post_attention_layernorm is not there"),
        ("GPTNeoX", {}, "no layers of the known form"),
    ):
        assert done in put_into(model_of(name, dtype, **more))[1], name


def test_sums_that_cancel_are_judged_by_float64(monkeypatch):
    """Attention that is nearly sure: gradients of query and key are what rounding leaves, in the plain layer, too."""
    model = model_of("Llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 300
        layer.self_attn.k_proj.weight.data *= 100
    judged, judge = [], layers._larger

    def watch(names, truth, own, ours):
        judged.append((truth[0].dtype, judge(names, truth, own, ours)))
        return judged[-1][1]

    monkeypatch.setattr(layers, "_larger", watch)
    assert put_into(model)[1] == "fused: 4 layers of LlamaDecoderLayer"
    reasons = [reason for dtype, reason in judged if dtype == torch.float32]
    assert any("an error of" in reason and "where the plain layer has 0" in reason for reason in reasons)
    assert any(dtype == torch.float64 for dtype, _ in judged)


def test_what_attention_by_document_cannot_compute_is_refused_with_the_reason():
    for name, more, reason in (
        ("Gemma2", {"head_dim": 12}, "softcap"),
        ("Llama", {"attention_dropout": 0.1}, "dropout"),
        ("GPT2", {"n_head": 4}, "dropout"),
        (
            "Qwen2Moe",
            {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["sliding_attention"] * 4},
            "logits differ",
        ),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 12}, "s_aux"),
    ):
        model = model_of(name, **more)
        with pytest.raises(UserError, match=reason):
            documents.install(model, model, "varlen", 64, CPU)
        assert model.config._attn_implementation != documents.NAME
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))  # it is as it was
    assert documents.install(model, model, "sdpa", 16, CPU) == (None, "asked for")


def test_a_cpu_takes_them_unasked_where_its_kernels_are(monkeypatch):
    if not NATIVE_BUILT:
        pytest.skip("fastft._C is not built")
    from fastft import _C
    from fastft.ops.decoder import cpu

    model = model_of("Llama")
    found, why = documents.install(model, model, "auto", 16, CPU)
    slow = _C.cpu_path() == "scalar"
    assert (found is None) == slow and why.startswith("automatic: this CPU" if slow else "automatic, by kernels for ")
    if found is not None:
        assert layers.install(model, model, found, 16, CPU).startswith("fused: 4 layers")
        found.remove()
    monkeypatch.setattr(cpu, "refuses", lambda dtype: "fastft._C is not built")
    assert documents.install(model, model, "auto", 16, CPU) == (None, "automatic: fastft._C is not built")
    assert documents.install(model, model, "varlen", 16, CPU)[0] is not None  # in plain torch
    assert documents.install(model, model, "sdpa", 16, CPU) == (None, "asked for")


@pytest.mark.parametrize("has", [True, False])
def test_bf16_with_and_without_instructions_for_it(has, monkeypatch):
    """The model's losses and gradients are near those of float32 either way, and nearer where it computes in it."""
    monkeypatch.setattr(processor, "cpu_multiplies_bf16", lambda: has)
    results = []
    for fused, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)):
        model = model_of("Llama", torch.bfloat16).to(dtype)
        if fused:
            assert put_into(model)[1].startswith("fused: 4 layers")
        model(**documents.packed_inputs(model, 20, CPU)).logits.float().square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    for one, plain, exact in zip(*results, strict=True):
        assert one.dtype == torch.bfloat16
        error, allowed = ((t.float() - exact).norm() / exact.norm() for t in (one, plain))
        assert error <= (1.5 if has else 1.0) * allowed + 2e-3


def test_other_forwards_run_as_before():
    model = model_of("Llama").eval()
    tokens = torch.arange(24).view(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    calls = ({}, {"attention_mask": mask}, {"use_cache": False})
    before = [model(input_ids=tokens, **given).logits for given in calls]
    generated = model.generate(tokens[:1], max_new_tokens=5, do_sample=False)
    put_into(model)
    for given, expected in zip(calls, before, strict=True):
        assert torch.equal(model(input_ids=tokens, **given).logits, expected)
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=5, do_sample=False), generated)


def test_gradients_of_the_model_with_checkpointing_too(monkeypatch):
    grads, calls, counted = [], [], []
    fused_layer = layers.decoder_layer
    monkeypatch.setattr(layers, "decoder_layer", lambda *given: calls.append(1) or fused_layer(*given))
    for fused, again in ((False, False), (True, False), (True, True)):
        model = model_of("Qwen2").train()
        if fused:
            put_into(model)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = documents.packed_inputs(model, 20, CPU)
        calls.clear()
        model(**inputs).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        counted.append(len(calls))
    assert counted == [0, 4, 8]  # each layer once more in the backward
    for plain, one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-6)
        assert torch.equal(one, other)


def test_plain_layers_with_attention_by_document_and_checkpointing():
    """Layers run again in the backward, when the forward is over."""
    grads = []
    for varlen, again in ((False, False), (True, False), (True, True)):
        model = model_of("Qwen3", head_dim=12).train()
        if varlen:
            documents.install(model, model, "varlen", 16, CPU)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**documents.packed_inputs(model, 20, CPU)).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-6)
        assert torch.equal(one, other)


def test_bounds():
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [3, 4, 0, 1, 0, 1]])
    bounds, longest = documents.bounds_of(torch.zeros(2, 6), positions)
    assert bounds.tolist() == [0, 2, 5, 6, 8, 10, 12] and bounds.dtype == torch.int32 and longest == 3


def test_batches_say_where_documents_begin(no_dropout):
    lm_config = no_dropout
    lm_config["model"]["attention"] = "varlen"
    job = jobs.job_of(lm_config)
    batch = jobs.batch_of(job, [0, 1, 2])
    bounds, longest = documents.bounds_of(batch.inputs["input_ids"], batch.inputs["position_ids"])
    assert torch.equal(batch.inputs["cu_seq_lens_q"], bounds) and batch.inputs["max_length_q"] == longest
    by = attention.kernels(torch.empty(0, 4, 8), 2)
    assert job.record["attention"] == f"varlen: asked for, by {by}"
    assert job.record["layers"].startswith("fused: ")
    lm_config["model"]["attention"] = "auto"
    assert (
        jobs.job_of(lm_config).record["attention"].startswith("automatic" if not NATIVE_BUILT else "varlen: automatic")
    )
    lm_config["model"]["layers"] = "plain"
    assert jobs.job_of(lm_config).record["layers"] == "plain: asked for"


def test_training_is_the_same_at_every_stage(no_dropout, tmp_path):
    """Losses of a few steps, by masks and by document, with the plain step and where the optimizer takes bf16 weights
    and gradients as they are.
    """
    lm_config = no_dropout
    lm_config["train"]["steps"] = 6
    paths = {}
    for name, model, optim, zero in (
        ("mask", {"attention": "sdpa"}, {}, 0),
        ("varlen", {"attention": "varlen"}, {}, 0),
        ("plain layers", {"attention": "varlen", "layers": "plain"}, {}, 0),
        ("ZeRO 2", {"attention": "varlen"}, {}, 2),
        ("ZeRO 3", {"attention": "varlen"}, {}, 3),
        ("bf16 ZeRO 1", {"dtype": "bf16", "attention": "varlen"}, {}, 1),
        ("bf16 varlen remainder", {"dtype": "bf16", "attention": "varlen"}, {"master": "remainder"}, 0),
        ("bf16 varlen checkpointing", {"dtype": "bf16", "attention": "varlen"}, {}, 0),
    ):
        config = {**lm_config, "model": {**lm_config["model"], **model}, "optim": {**lm_config["optim"], **optim}}
        again = "checkpointing" in name
        config |= {
            "parallel": {"zero": zero, "activation_checkpointing": again},
            "run": {**lm_config["run"], "dir": str(tmp_path / name)},
        }
        paths[name] = launch.write_config(tmp_path / f"{name}.yaml", config)
    launch.ranks(1, [RUNS, "train", *paths.values()])
    curves, done = {}, {}
    for name in paths:
        records = track.read(tmp_path / name)
        curves[name] = torch.tensor([r["loss"] for r in records if r["kind"] == "train"])
        done[name] = next(r for r in records if r["kind"] == "run").get("layers", "")
    assert [name for name, layers in done.items() if layers.startswith("fused")] == [
        "varlen",
        "ZeRO 2",
        "bf16 ZeRO 1",
        "bf16 varlen remainder",
        "bf16 varlen checkpointing",
    ]
    assert curves["mask"][-1] < curves["mask"][0] - 0.1
    for name, curve in curves.items():
        tolerance = 2e-2 if "bf16" in name else 2e-4
        torch.testing.assert_close(curve, curves["mask"], rtol=tolerance, atol=tolerance)


def test_parts_of_layers_that_are_not_fused_whole():
    """Norms and gated MLPs by themselves, with adapters too; what is of another form stays."""
    from peft import LoraConfig, inject_adapter_in_model

    big = {"hidden_size": 256, "intermediate_size": 320}
    for name, more, adapters, done in (
        ("Llama", {}, False, "9 norms, 4 gated MLPs"),
        ("Llama", {}, True, "9 norms, 4 gated MLPs"),
        ("Qwen3", {"head_dim": 12}, False, "9 norms, 4 gated MLPs"),  # not its norms of single heads
        ("Phi3", {}, False, "9 norms"),  # gate and up are one matrix there
        ("Gemma", {}, False, "none"),  # 1 + weight, and gelu
        ("Granite", {}, False, "9 norms, 4 gated MLPs"),
        ("GPTNeoX", {}, False, "none"),
    ):
        grads = []
        for fused in (False, True):
            model = model_of(name, **{**more, **big})
            if adapters:
                torch.manual_seed(1)
                model = inject_adapter_in_model(
                    LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0), model
                )
            if fused:
                assert parts.install(model, torch.float32, CPU) == done, name
                assert parts.install(model, torch.float32, CPU) == "none"  # once is enough
            model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits.square().mean().backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        for plain, own in zip(*grads, strict=True):
            torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-5 * max(plain.abs().max().item(), 1e-2))


def test_a_copy_computes_with_its_own_weights():
    model = model_of("Llama").eval()
    put_into(model)
    inputs = documents.packed_inputs(model, 20, CPU)
    before = model(**inputs).logits
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copied(**inputs).logits, before)
    plain = copied(input_ids=inputs["input_ids"]).logits
    assert plain.abs().max() > 0
    assert model(**inputs).logits.abs().max() == 0


def test_hooks_inside_a_layer_are_called():
    model = model_of("Llama").eval()
    put_into(model)
    inputs = documents.packed_inputs(model, 20, CPU)
    fused = model(**inputs).logits
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(model(**inputs).logits, fused, rtol=1e-4, atol=1e-5)
    assert seen == [(2, 20, 48)]


def test_varlen_without_packed_documents_is_refused(no_dropout):
    no_dropout["model"]["attention"] = "varlen"
    no_dropout["data"]["packing"] = "none"
    with pytest.raises(UserError, match="for packed documents"):
        jobs.job_of(no_dropout)
