"""Tiny models for the tests of the output head; as a program, the ranks of the test under ZeRO:

python tests/models/heads.py OUT   three steps of each model and ZeRO stage, losses to OUT (rank 0)
"""

import json
import sys

import torch
import transformers
from torch import nn

from fastft.cli import leave

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
SEQ2SEQ = {"vocab_size": 97, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
CAUSAL = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama_tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=97,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
}
PAIRS = {
    "t5": lambda: transformers.T5Config(**SEQ2SEQ, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0),
    "t5_untied": lambda: transformers.T5Config(
        **SEQ2SEQ, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0, tie_word_embeddings=False
    ),
    "bart": lambda: transformers.BartConfig(
        **SEQ2SEQ,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        dropout=0.0,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        forced_eos_token_id=None,
    ),
}


class LowRankHead(nn.Linear):
    """A hand-written LoRA of a head: its children are used, not called."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, hidden):
        return super().forward(hidden) + self.up(self.down(hidden))

    def loss_parts(self, hidden):
        return self.weight, self.bias, (self.down(hidden), self.up.weight)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model by name: one of CAUSAL or PAIRS, or llama with "lora"
    (PEFT's, on the head and elsewhere) or "low_rank" (hand-written).
    """
    torch.manual_seed(0)
    if name in PAIRS:
        auto, config = transformers.AutoModelForSeq2SeqLM, PAIRS[name]()
    else:
        auto, config = transformers.AutoModelForCausalLM, CAUSAL.get(name, CAUSAL["llama"])()
    model = auto.from_config(config, dtype=dtype)
    if name == "bart":
        model.final_logits_bias.normal_()
    if name == "low_rank":
        model.lm_head = LowRankHead(model.lm_head, 4).to(dtype)
    if name == "lora":
        import peft

        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, settings)
    for p in model.parameters():  # weights as of a trained model: logits of some size
        if p.ndim == 2:
            p.data.mul_(4)
    return model


def batch_of(name: str) -> tuple[dict, torch.Tensor]:
    """(inputs, targets) with a third of the targets ignored."""
    g = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(3, 97, (2, 11), generator=g) for _ in range(2))
    target[:, ::3] = -100
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(0)} if name in PAIRS else {"use_cache": False})}, target


def plain_loss(model, inputs: dict, target: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def losses_under_zero(name: str, stage: int, fused: bool) -> list[float]:
    import deepspeed

    from fastft.models.head import FusedHead

    model = model_of(name)
    inputs, target = batch_of(name)
    head = FusedHead(model) if fused else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    world = torch.distributed.get_world_size()
    settings = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    losses = []
    for _ in range(3):
        loss = head.loss(engine, inputs, target) if fused else plain_loss(engine, inputs, target)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def main(out: str) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    found = {
        name: {
            "plain": losses_under_zero(name, 0, False),
            **{f"zero{stage}": losses_under_zero(name, stage, True) for stage in range(4)},
        }
        for name in ("llama_tied", "lora", "low_rank")
    }
    if torch.distributed.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
