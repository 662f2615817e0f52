"""Parameters that take no part in a step keep their value at every ZeRO stage, as torch's optimizers leave them."""

import pytest
import torch
from safetensors.torch import load_file

import launch

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
WHERE = [(zero, dtype) for zero in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def xlnet(tmp_path_factory, corpus):
    """A classifier in whose forward ``mask_emb`` and, without token types, ``seg_embed`` take no part."""
    from conftest import _tokenizer
    from transformers import XLNetConfig, XLNetForSequenceClassification

    folder = tmp_path_factory.mktemp("xlnet")
    tokenizer = _tokenizer(corpus, folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    config = XLNetConfig(**sizes, pad_token_id=tokenizer.pad_token_id, num_labels=3)
    XLNetForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_unused_parameters_keep_their_value(classification_config, tmp_path, xlnet, world):
    """Weight decay of 0.5 a step shrinks what it touches at once; the used parameters, it does."""
    paths = []
    for zero, dtype in WHERE:
        name = f"z{zero}-{dtype}"
        config = {
            **classification_config,
            "model": {"path": str(xlnet), "dtype": dtype},
            "data": {**classification_config["data"], "cache": str(tmp_path / "prepared")},
            "optim": {"lr": 1e-2, "weight_decay": 0.5},
            "parallel": {"zero": zero},
            "run": {**classification_config["run"], "dir": str(tmp_path / name)},
        }
        paths.append(launch.write_config(tmp_path / f"{name}.yaml", config))
    launch.ranks(world, [RUNS, "train", *paths])
    before = load_file(xlnet / "model.safetensors")
    for zero, dtype in WHERE:
        after = load_file(tmp_path / f"z{zero}-{dtype}" / "model" / "model.safetensors")
        for name in ("transformer.mask_emb", "transformer.layer.0.rel_attn.seg_embed"):
            assert torch.equal(after[name], before[name].to(after[name].dtype)), (zero, dtype, name)
        assert not torch.equal(after["logits_proj.weight"].float(), before["logits_proj.weight"].float())


def test_an_adapter_that_is_used_by_some_steps_only(tmp_path):
    """One parameter has a gradient in every other step: it moves in those, and its moments wait in between."""
    from types import SimpleNamespace

    from fastft.optim import FusedAdamW
    from fastft.zero.unused import Unused

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        own = True
    else:
        own = False
    try:
        model = torch.nn.ParameterList([torch.ones(3), torch.ones(3)])
        optimizer = FusedAdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        engine = SimpleNamespace(module=model, optimizer=optimizer, device=torch.device("cpu"))
        engine.zero_optimization_stage = lambda: 0
        unused = Unused(engine, optimizer)
        model[0].sum().backward()
        assert unused.take() == [model[1]]
        (model[0].sum() + model[1].sum()).backward()
        assert unused.take() == []
        assert [p.tolist() for p in unused.take()] == [[1.0] * 3] * 2, "what was taken is forgotten"
    finally:
        if own:
            torch.distributed.destroy_process_group()


EXPERTS = """
import sys, torch, torch.distributed as dist
from fastft import config as configuration
from fastft.cli import leave
from fastft.errors import UserError
from fastft.optim import FusedAdamW
from fastft.ranks import environment
from fastft.zero import engine
from fastft.zero.settings import deepspeed_config

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, chosen):
        return sum(self.experts[i](x) for i in chosen)

stage = int(sys.argv[1])
raw = {"task": "causal_lm", "model": {"path": "x"}, "parallel": {"zero": stage}, "run": {"device": "cpu"}}
config = configuration.validate(raw)
ranks = environment(config)
engine.start_process_group()
torch.manual_seed(0)
net = Net()
first = [p.detach().clone() for p in net.parameters()]
optimizer = FusedAdamW(net.parameters(), lr=0.1, weight_decay=0.5)
built = engine.build_engine(net, optimizer, deepspeed_config(config, ranks))
stepper = engine.Stepper(built, optimizer, None)

def step(chosen):
    stepper.boundary(True)
    stepper.backward(built(torch.ones(2, 4), chosen).sum(), True)

step([0, 1])  # alike on all ranks: the third stays as it was
after = [p.detach().clone() for p in net.parameters()]
assert [torch.equal(a, b) for a, b in zip(first, after)] == [False] * 4 + [True] * 2
try:
    step([0, 1] if ranks.rank else [0, 2])
    assert stage == 0, "parameters of different ranks were added up"
except UserError as e:
    assert stage and "parallel.zero: 0" in str(e), e
leave(0)
"""


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_what_some_ranks_use_and_others_do_not(tmp_path, zero):
    """Stage 0 reduces every parameter; 1 and 2, whose buckets fill in the order of the gradients, refuse. (At 3 such
    ranks wait for each other in the forward already, which is for the watchdog.)
    """
    (tmp_path / "experts.py").write_text(EXPERTS)
    launch.ranks(2, [tmp_path / "experts.py", str(zero)])
