"""Run as ranks by the tests: ``python tests/zero/loaded.py FOLDER``: models of files, loaded in parts beside the same
ones loaded whole.

Every rank asserts that its parts are those of the whole model, bit for bit, in the dtype that a whole load gives, and
that they come from the files' own pages.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from fastft.cli.main import leave
from fastft.config import Model
from fastft.models import load
from fastft.models.deferred import Deferred, Step
from fastft.zero.making import SMALL, Making, held

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 64}
KINDS = ["sliding_attention", "full_attention"]
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
GROUPS = {"n_routed_experts": 5, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
SPEECH = {"vocab_size": 30, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SPEECH |= {"num_attention_heads": 2, "conv_dim": (64,) * 7, "num_conv_pos_embedding_groups": 4}
PAIRS = {"vocab_size": 300, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
CONFIGS = {
    "tied": ("AutoModelForCausalLM", transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "scaled": (  # its scale of the embedding is a buffer of the model's dtype, in no file
        "AutoModelForCausalLM",
        transformers.Gemma3TextConfig(**SIZES, head_dim=32, num_key_value_heads=1, layer_types=KINDS),
    ),
    "experts": ("AutoModelForCausalLM", transformers.MixtralConfig(**SIZES, num_local_experts=5)),
    "shared": ("AutoModelForCausalLM", transformers.Qwen3MoeConfig(**SIZES, **ROUTED, num_experts=5)),
    "latent": (  # routers in float32, whatever dtype is asked for
        "AutoModelForCausalLM",
        transformers.DeepseekV3Config(**SIZES, **ROUTED, **LATENT, **GROUPS, num_key_value_heads=2),
    ),
    "transposed": (
        "AutoModelForCausalLM",
        transformers.GptOssConfig(**SIZES, num_local_experts=5, head_dim=32, num_key_value_heads=1, layer_types=KINDS),
    ),
    "relative": ("AutoModelForMaskedLM", transformers.DebertaV2Config(**SIZES, relative_attention=True)),
    "permuted": (  # parts of its attention are float32 to transformers
        "AutoModelForSequenceClassification",
        transformers.XLNetConfig(vocab_size=300, d_model=64, n_layer=1, n_head=2, d_inner=128, num_labels=3),
    ),
    "unpadded": ("AutoModelForMaskedLM", transformers.ModernBertConfig(**SIZES, pad_token_id=0)),
    "sinusoids": ("AutoModelForSeq2SeqLM", transformers.MarianConfig(**PAIRS, decoder_start_token_id=0)),
    "speech": ("AutoModelForCTC", transformers.Wav2Vec2Config(**SPEECH, num_conv_pos_embeddings=16)),
}


def write(folder: Path) -> None:
    """Files in bf16; of the Llama also with a config that says float32, some weights in float32, and by torch.save."""
    for name, (kind, config) in CONFIGS.items():
        torch.manual_seed(0)
        model = getattr(transformers, kind).from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        if name != "tied":
            continue
        for other in ("says_float32", "mixed", "pickled"):
            model.save_pretrained(folder / other)
        said = folder / "says_float32" / "config.json"
        said.write_text(json.dumps(json.loads(said.read_text()) | {"dtype": "float32"}))
        file = folder / "mixed" / "model.safetensors"
        tensors = load_file(file)
        for key in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            tensors[key] = torch.randn(tensors[key].shape)
        save_file(tensors, file, metadata={"format": "pt"})
        file = folder / "pickled" / "model.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()


def files_of(source) -> list[torch.Tensor]:
    """What a weight is computed of."""
    if isinstance(source, torch.Tensor) and not isinstance(source, Deferred):
        return [source]
    step = source.step if isinstance(source, Deferred) else source
    return [t for a in tree_leaves((step.args, step.kwargs)) if isinstance(a, torch.Tensor | Step) for t in files_of(a)]


def mapped(tensor: torch.Tensor) -> bool:
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, inode = line.split()[:5]
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= at < end:
            return inode != "0"
    return False


def check(folder: Path, kind: str, dtype: str) -> None:
    name = f"{folder.name} in {dtype}"
    settings = Model(path=str(folder), dtype=dtype)
    whole, _ = load.build(settings, kind, (), 0)
    made, _ = load.build(settings, kind, (), 0, making=Making(torch.device("cpu")))
    own = dict(made.named_parameters(remove_duplicate=False))
    every = dict(whole.named_parameters(remove_duplicate=False))
    assert own.keys() == every.keys()
    rank, world = dist.get_rank(), dist.get_world_size()
    for key, expected in every.items():
        found, part = own[key], held(own[key])
        assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad, f"{name}: {key}"
        assert (part is None) == (expected.numel() < SMALL), f"{name}: {key}"
        if part is None:
            assert torch.equal(found, expected), f"{name}: {key} differs"
            continue
        assert part.part or all(mapped(t) for t in files_of(part.source)), f"{name}: {key} is in memory"
        assert torch.equal(part.whole(found, torch.device("cpu")), expected), f"{name}: {key} differs"
        for wanted in (torch.float32, torch.bfloat16):
            size = -(-expected.numel() // world)
            taken = torch.zeros(size, dtype=wanted)
            part.into(taken)
            rest = expected.detach().reshape(-1)[rank * size : (rank + 1) * size].to(wanted)
            assert torch.equal(taken[: len(rest)], rest), f"{name}: {key}, part of {wanted} differs"
        for others in () if part.part else (3, 7, 1999):  # ranks that there are not; the last of many have nothing
            size = -(-expected.numel() // others)
            for at in (0, others // 2, others - 1):
                taken = torch.zeros(size, dtype=expected.dtype)
                with mock.patch("torch.distributed.get_rank", return_value=at):
                    part.into(taken)
                rest = expected.detach().reshape(-1)[at * size : (at + 1) * size]
                assert torch.equal(taken[: len(rest)], rest), f"{name}: {key}, part {at} of {others} differs"
    ties = lambda parameters: {k: [n for n, p in parameters.items() if p is q] for k, q in parameters.items()}
    assert ties(own) == ties(every)
    for key, buffer in whole.named_buffers():
        found = made.get_buffer(key)
        assert found.dtype == buffer.dtype and torch.equal(found, buffer), f"{name}: {key} differs"


def filled(model) -> None:
    with torch.no_grad():
        model.lm_head.weight[0] = 1.0


def replaced(model) -> None:
    before = model.lm_head.weight * 2
    model.lm_head.weight.data = model.lm_head.weight.data + 1.0
    model.sum = torch.nn.Parameter(before.detach())


def given_others(model) -> None:
    model.lm_head.weight.data = torch.ones(300, 64)


def tried(model) -> None:
    with contextlib.suppress(RuntimeError):
        filled(model)


def narrowed(model) -> None:
    model.model.layers[0].mlp.up_proj.half().float()


def looked_at(model) -> None:
    model.scale = float(model.lm_head.weight.detach().numpy().std())


def noted(model) -> None:
    model.first = model.lm_head.weight.detach()[:3].t()
    model.lm_head.weight.fastft_note = "kept"
    ones = torch.ones(300, 64)
    model.sum = torch.nn.Parameter(model.lm_head.weight.detach() + ones)
    ones.zero_()


class Own(transformers.LlamaForCausalLM):
    """A class that does something with its weights when they have been loaded."""

    act = None

    def tie_weights(self, *args, **kwargs):
        super().tie_weights(*args, **kwargs)
        if not self.lm_head.weight.is_meta:
            type(self).act(self)


def check_class(folder: Path, act, in_parts: bool) -> None:
    """As in a whole load, which it is where the class changes weights or wants their memory."""
    transformers.Own, Own.act = Own, staticmethod(act)
    settings = Model(path=str(folder))
    whole, _ = load.build(settings, "Own", ("sum",), 0)
    made, _ = load.build(settings, "Own", ("sum",), 0, making=Making(torch.device("cpu")))
    assert (held(made.lm_head.weight) is not None) == in_parts, act
    for name, expected in whole.named_parameters():
        part = held(made.get_parameter(name))
        found = part.whole(made.get_parameter(name), torch.device("cpu")) if part else made.get_parameter(name)
        assert torch.equal(found, expected), (act, name)
    for name in ("first", "scale"):
        if hasattr(whole, name):
            assert type(getattr(made, name)) is type(getattr(whole, name))
            assert torch.equal(torch.as_tensor(getattr(made, name)), torch.as_tensor(getattr(whole, name)))
    note = getattr(whole.lm_head.weight, "fastft_note", None)
    assert getattr(made.lm_head.weight, "fastft_note", None) == note


if __name__ == "__main__":
    given = Path(sys.argv[1])
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        write(given)
    dist.barrier()
    for case in sorted(given.iterdir()):
        for precision in ("fp32", "bf16"):
            check(case, CONFIGS[case.name if case.name in CONFIGS else "tied"][0], precision)
    for own in (filled, given_others, tried, looked_at):
        check_class(given / "tied", own, in_parts=False)
    for own in (replaced, narrowed, noted):
        check_class(given / "tied", own, in_parts=True)
    dist.destroy_process_group()
    leave(0)
