"""Attention does not cross documents: equal logits packed and unpacked, per architecture and attention backend."""

import pytest
import torch
import transformers

from fastft.errors import UserError
from fastft.models.isolation import check_isolation

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gemma3_sliding": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=4),
}


def model_of(name: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name](), attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_packed_logits_equal_unpacked(name, attention):
    model = model_of(name, attention)
    assert check_isolation(model, model, 16, torch.device("cpu"), flat=False) < 1e-5


def test_bf16_is_allowed_its_rounding():
    model = model_of("llama").bfloat16()
    check_isolation(model, model, 16, torch.device("cpu"), flat=False)


def test_a_model_that_leaks_is_refused():
    """A Llama whose attention is given a cache: transformers then reads restarting positions as one sequence."""
    model = model_of("llama")
    inner = model.forward
    leaky = lambda input_ids, position_ids, use_cache: inner(
        input_ids=input_ids, position_ids=position_ids, use_cache=True
    )
    model.forward = leaky
    with pytest.raises(UserError, match="see each other"):
        check_isolation(model, model, 16, torch.device("cpu"), flat=False)


def test_a_state_space_model_is_refused():
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="packing: none"):
        check_isolation(model, model, 16, torch.device("cpu"), flat=False)


def test_the_model_comes_back_as_it_was():
    model = model_of("llama").train()
    check_isolation(model, model, 16, torch.device("cpu"), flat=False)
    assert model.training
