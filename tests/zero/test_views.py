"""Views of weights that ZeRO 3 gathers: autograd keeps where they are, and gets them when they are gathered again."""

import copy

import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef

import launch
from fastft import track
from fastft.zero import views

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}


def experts() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    module = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def routed(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    chosen = torch.tensor([[0, 1], [2, 0], [3, 2], [1, 3], [0, 3]])
    return module(x, chosen, torch.full(chosen.shape, 0.5))


def test_a_gathered_weight_is_let_go_of_and_found_again():
    """What DeepSpeed does: the weights lie in one buffer, are gone after the forward, and lie in another later."""
    plain, module = experts(), experts()
    views.keep_none(module)
    x = torch.randn(5, 32)
    wanted = routed(plain, x.clone().requires_grad_())
    wanted.square().sum().backward()

    values = [p.detach().clone() for p in module.parameters()]

    def gather() -> torch.Tensor:
        buffer = torch.cat([torch.zeros(7), *(value.flatten() for value in values)])
        for parameter, value, part in zip(
            module.parameters(), values, buffer[7:].split([v.numel() for v in values]), strict=True
        ):
            parameter.data = part.view(value.shape)
        return buffer

    buffer = gather()
    gathered = StorageWeakRef(buffer.untyped_storage())
    own = x.clone().requires_grad_()
    found = routed(module, own)
    for parameter in module.parameters():
        parameter.data = torch.empty(0)
    del buffer
    assert gathered.expired(), "something holds the gathered weights"
    assert torch.equal(found, wanted)
    gather()
    found.square().sum().backward()
    for mine, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_without_it_autograd_holds_the_gathered_weights():
    """The reason for all this; if torch or transformers ever does without, so can fastft."""
    module = experts()
    held = StorageWeakRef(module.gate_up_proj.untyped_storage())
    found = routed(module, torch.randn(5, 32, requires_grad=True))
    for parameter in module.parameters():
        parameter.data = torch.empty(0)
    assert not held.expired() and found.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixture_trains_in_shards_as_whole(lm_config, tmp_path, checkpointing):
    """Two ranks at ZeRO 3 beside ZeRO 0: losses and weights."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    transformers.AutoTokenizer.from_pretrained(lm_config["model"]["path"]).save_pretrained(tmp_path / "m")
    lm_config["model"] = {"path": str(tmp_path / "m")}
    lm_config["parallel"] = {"activation_checkpointing": checkpointing}
    found = {}
    for zero in (0, 3):
        made = copy.deepcopy(lm_config)
        made["parallel"]["zero"] = zero
        made["run"]["dir"] = str(tmp_path / f"run{zero}")
        launch.ranks(2, ["-m", "fastft", "train", launch.write_config(tmp_path / f"{zero}.yaml", made)])
        losses = [r["loss"] for r in track.read(tmp_path / f"run{zero}") if r["kind"] == "train"]
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"run{zero}" / "model")
        found[zero] = losses, model.state_dict()
    assert found[3][0] == pytest.approx(found[0][0], rel=1e-5) and len(found[0][0]) == 4
    for name, weight in found[0][1].items():
        assert torch.allclose(found[3][1][name], weight, atol=2e-4), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_alone_are_trained_in_shards(lm_config, tmp_path, checkpointing):
    """What comes before the first of them is frozen: their input needs no gradient."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    transformers.AutoTokenizer.from_pretrained(lm_config["model"]["path"]).save_pretrained(tmp_path / "m")
    frozen = ["*embed*", "*attn*", "*norm*", "*.gate.*", "lm_head*"]
    lm_config["model"] = {"path": str(tmp_path / "m"), "freeze": frozen}
    losses = {}
    for zero in (0, 3):
        lm_config["parallel"] = {"zero": zero, "activation_checkpointing": checkpointing}
        lm_config["run"]["dir"] = str(tmp_path / f"run{zero}")
        launch.ranks(2, ["-m", "fastft", "train", launch.write_config(tmp_path / f"{zero}.yaml", lm_config)])
        losses[zero] = [r["loss"] for r in track.read(tmp_path / f"run{zero}") if r["kind"] == "train"]
    assert losses[3] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 4
