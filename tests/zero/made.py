"""Run as ranks by the tests: ``python tests/zero/made.py``: models made in parts, beside the same ones made whole.

Every rank asserts that its parts are those of the whole model, bit for bit, and that no two parameters were whole at a
time.
"""

import copy

import torch
import torch.distributed as dist
import transformers
from torch import nn

from fastft.cli.main import leave
from fastft.zero.making import SMALL, Making, held

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0}
SPEECH = {"vocab_size": 30, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SPEECH |= {"num_attention_heads": 2, "conv_dim": (64,) * 7, "num_conv_pos_embedding_groups": 4}
CASES = [
    ("AutoModelForCausalLM", transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    ("AutoModelForCausalLM", transformers.GPT2Config(**GPT2, eos_token_id=0)),  # draws some weights twice
    ("AutoModelForCausalLM", transformers.MixtralConfig(**SIZES, num_local_experts=3)),  # experts in one tensor
    ("AutoModelForCausalLM", transformers.MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2)),
    ("AutoModelForMaskedLM", transformers.ModernBertConfig(**SIZES, pad_token_id=0)),  # draws by rejection
    ("AutoModelForSequenceClassification", transformers.DebertaV2Config(**SIZES, relative_attention=True)),
    ("AutoModelForSeq2SeqLM", transformers.T5Config(vocab_size=300, d_model=64, d_ff=128, num_layers=2, num_heads=2)),
    ("AutoModelForCTC", transformers.Wav2Vec2Config(**SPEECH, num_conv_pos_embeddings=16)),  # a parametrization
]


class Odd(nn.Module):
    """Writes to weights of its children: through views, after others were made, and from one to another."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(70, 33, padding_idx=3)
        self.layers = nn.ModuleList([nn.Linear(33, 70), nn.Linear(33, 70)])
        self.table.weight.data[5:7].fill_(2.0)
        view = self.layers[1].weight.data
        rows = view[:2]
        del view
        self.last = nn.Linear(33, 40)
        with torch.no_grad():
            rows.mul_(3.0)
            nn.init.zeros_(self.table.weight[9])
            self.layers[0].weight.copy_(self.table.weight + self.layers[1].weight)
            self.last.weight.data = torch.randn(40, 33).to(torch.bfloat16)


def check(make, name: str) -> None:
    torch.manual_seed(3)
    whole, state = make(), torch.random.get_rng_state()
    making, most = Making(torch.device("cpu")), 0
    plain = making._open

    def counted(*arguments) -> None:
        nonlocal most
        plain(*arguments)
        most = max(most, len(making.opened))

    making._open = counted
    torch.manual_seed(3)
    with making.constructing():
        made = make()
    assert torch.equal(state, torch.random.get_rng_state()), f"{name}: another state of the generator"
    assert most <= (3 if name == "Odd" else 1), f"{name}: {most} parameters were whole at a time"
    own = dict(made.named_parameters(remove_duplicate=False))
    every = dict(whole.named_parameters(remove_duplicate=False))
    assert own.keys() == every.keys()
    for key, expected in every.items():
        part = held(own[key])
        assert (part is None) == (expected.numel() < SMALL), f"{name}: {key}"
        found = part.whole(own[key], torch.device("cpu")) if part else own[key]
        assert part is None or part.source.numel() == -(-expected.numel() // dist.get_world_size())
        assert found.dtype == expected.dtype and torch.equal(found, expected), f"{name}: {key} differs"
    for key, buffer in whole.named_buffers():
        assert torch.equal(buffer, made.get_buffer(key)), f"{name}: {key} differs"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check(Odd, "Odd")
    for kind, config in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            auto = getattr(transformers, kind)
            name = f"{type(config).__name__} in {dtype}"
            check(lambda: auto.from_config(copy.deepcopy(config), dtype=dtype), name)  # noqa: B023
    dist.destroy_process_group()
    leave(0)
