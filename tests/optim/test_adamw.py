"""FusedAdamW beside torch.optim.AdamW, and under everything ZeRO does to a client optimizer."""

import copy
import pickle

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import launch
from fastft.ops import backends
from fastft.optim import FusedAdamW

SETTINGS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "hyper": {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
}


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)


def train(net, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).to(net[0].weight.dtype)
        optimizer.zero_grad()
        net(x).float().square().sum().backward()
        optimizer.step()


def assert_same(one, other, **tolerance):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_trains_like_torchs(name):
    ours, theirs = model(), model()
    train(ours, FusedAdamW(ours.parameters(), **SETTINGS[name]), 10)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **SETTINGS[name]), 10)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


def test_l2_mode_trains_like_torchs_adam():
    ours, theirs = model(), model()
    train(ours, FusedAdamW(ours.parameters(), weight_decay=0.1, adam_w_mode=False), 10)
    train(theirs, torch.optim.Adam(theirs.parameters(), weight_decay=0.1), 10)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("first", "second"), [(FusedAdamW, torch.optim.AdamW), (torch.optim.AdamW, FusedAdamW)])
def test_trap_state_dict_goes_to_torch_and_back(first, second, name):
    net = model()
    optimizer = first(net.parameters(), **SETTINGS[name])
    train(net, optimizer, 5)
    other_net = copy.deepcopy(net)
    other = second(other_net.parameters())  # the settings come with the state
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again_net = copy.deepcopy(net)
    again = first(again_net.parameters())
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    for n, o in ((net, optimizer), (other_net, other), (again_net, again)):
        train(n, o, 5, first=5)
    assert_same(net, again_net, rtol=0, atol=0)
    assert_same(net, other_net, rtol=1e-5, atol=1e-6)
    assert {s["step"].item() for s in other.state.values()} == {10.0}


def test_trap_loading_keeps_float32_state_of_bfloat16_params():
    net = model(torch.bfloat16)
    optimizer = FusedAdamW(net.parameters(), lr=1e-2, amsgrad=True)
    train(net, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed_net = copy.deepcopy(net)
    resumed = FusedAdamW(resumed_net.parameters())
    seen = []
    resumed.register_load_state_dict_pre_hook(lambda _, state: seen.append(type(state["state"][0]["exp_avg"])))
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(o.state[resumed_net[0].weight]["exp_avg"].dtype))
    resumed.load_state_dict(saved)
    assert seen == [torch.Tensor, torch.float32]  # the caller's hooks see tensors, as they should be
    for i, param in enumerate(resumed_net.parameters()):
        for key, value in saved["state"][i].items():
            assert torch.equal(resumed.state[param][key], value) and resumed.state[param][key].dtype == torch.float32
    train(net, optimizer, 5, first=5)
    train(resumed_net, resumed, 5, first=5)
    assert_same(net, resumed_net, rtol=0, atol=0)


def test_torchs_bfloat16_state_becomes_float32():
    net = model(torch.bfloat16)
    theirs = torch.optim.AdamW(net.parameters())
    train(net, theirs, 3)
    ours = FusedAdamW(net.parameters())
    ours.load_state_dict(theirs.state_dict())
    assert all(s["exp_avg"].dtype == s["exp_avg_sq"].dtype == torch.float32 for s in ours.state.values())
    train(net, ours, 3)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_optimizer_work(clone):
    net = model()
    optimizer = FusedAdamW(net.parameters(), backend="reference")
    train(net, optimizer, 2)
    twin = clone(optimizer)
    assert twin.backend == "reference"
    for param, original in zip(twin.param_groups[0]["params"], net.parameters(), strict=True):
        param.grad = original.grad.clone()
    optimizer.step()
    twin.step()
    for param, original in zip(twin.param_groups[0]["params"], net.parameters(), strict=True):
        assert torch.equal(param, original) and twin.state[param]["step"] == 3


def test_trap_intermittent_gradients_and_empty_groups():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = FusedAdamW([{"params": [a, b]}, {"params": []}])
    a.grad = torch.ones(3)
    optimizer.step()
    b.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer.step()
    a.grad = None
    optimizer.step()
    assert optimizer.state[a]["step"] == 2 and optimizer.state[b]["step"] == 2
    assert optimizer.state[b]["exp_avg"].dtype == torch.float32


def test_trap_inf_skip_leaves_params_state_and_step():
    net = model()
    optimizer = FusedAdamW(net.parameters())
    train(net, optimizer, 3)
    before = copy.deepcopy([p.detach() for p in net.parameters()]), copy.deepcopy(optimizer.state_dict()["state"])
    for param in net.parameters():
        param.grad.fill_(float("nan"))
    optimizer.step(found_inf=torch.tensor(1.0))
    for param, old in zip(net.parameters(), before[0], strict=True):
        assert torch.equal(param, old)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], before[1][index][key]) for key in state)


def test_grad_scale_multiplies():
    ours, theirs = model(), model()
    one, other = FusedAdamW(ours.parameters(), eps=1e-3), FusedAdamW(theirs.parameters(), eps=1e-3)
    for net, factor in ((ours, 8.0), (theirs, 1.0)):
        (factor * net(torch.ones(2, 7)).square().sum()).backward()
    one.step(grad_scale=torch.tensor(0.125))
    other.step()
    assert_same(ours, theirs, rtol=0, atol=0)


def test_closure_and_lr_scheduler_and_tensor_lr():
    net, other = model(), model()
    results = []
    for n, lr in ((net, 1e-2), (other, torch.tensor(1e-2, dtype=torch.float64))):
        optimizer = FusedAdamW(n.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

        def closure(n=n, optimizer=optimizer):
            optimizer.zero_grad()
            loss = n(torch.ones(2, 7)).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            results.append(optimizer.step(closure).item())
            schedule.step()
    assert results[:3] == results[3:] and results[0] > results[2]
    assert_same(net, other, rtol=0, atol=0)


def test_trap_zero_swaps_and_empties_the_groups():
    """Stages 1 and 2 step a group at a time through a new list; stage 3 hands over flat tensors and takes them back."""
    flats = [torch.randn(5), torch.randn(4)]  # plain tensors, not Parameters, as ZeRO's are
    expected = [f.clone().requires_grad_() for f in flats]
    theirs = torch.optim.AdamW([{"params": [f]} for f in expected], lr=1e-2)
    module = [torch.nn.Parameter(torch.ones(3, 3)) for _ in flats]
    ours = FusedAdamW([{"params": [p], "name": str(i)} for i, p in enumerate(module)], lr=1e-2)
    for flat in flats:
        flat.requires_grad_()
    for step in range(4):
        for i in range(2):
            flats[i].grad = torch.randn(flats[i].shape, generator=torch.Generator().manual_seed(10 * step + i))
            expected[i].grad = flats[i].grad.clone()
            if step % 2:  # stages 1 and 2
                groups = ours.param_groups
                groups[i]["params"] = [flats[i]]
                ours.param_groups = [groups[i]]
                ours.step()
                ours.param_groups = groups
            else:  # stage 3
                for group in ours.param_groups:
                    group["params"] = []
                ours.param_groups[i]["params"] = [flats[i]]
                ours.step()
                ours.param_groups[i]["params"] = []
        theirs.step()
    for i in range(2):
        torch.testing.assert_close(flats[i], expected[i], rtol=1e-5, atol=1e-6)
        state = ours.state[flats[i]]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 4
        assert state["exp_avg"].shape == flats[i].shape and state["step"].ndim == 0
    assert all(p not in ours.state for p in module)


def test_trap_empty_dict_as_state():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([param])
    optimizer.state[param] = {}
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_steps_suspended_changes_nothing():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([param])
    param.grad = torch.zeros(3)
    with optimizer.steps_suspended():
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3)) and not optimizer.state
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_backend_is_handed_on():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    param.grad = torch.ones_like(param)
    FusedAdamW([param]).step()
    with pytest.raises((backends.BackendError, ValueError)):
        FusedAdamW([param], backend="native").step()
    with pytest.raises(ValueError, match="unknown backend 'nativ'"):
        FusedAdamW([param], backend="nativ").step()


WRONG = {
    "lr": ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    "lr_tensor": ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    "beta1": ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    "beta2": ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    "eps": ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    "weight_decay": ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        FusedAdamW([torch.nn.Parameter(torch.ones(1))], **arguments)


def test_refuses_sparse_and_complex_gradients():
    sparse = torch.nn.Embedding(5, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        FusedAdamW(sparse.parameters()).step()
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="complex"):
        FusedAdamW([param]).step()


ENGINE = """
import sys, torch, deepspeed
from fastft.optim import FusedAdamW
stage, dtype = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
decay, rest = [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim == 1]
groups = [{"params": decay, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, half a minute
optimizer = FusedAdamW(groups, lr=1e-2)
before = [p.detach().clone() for p in net.parameters()]
config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
          "zero_allow_untested_optimizer": True,
          "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": dtype == "bf16"}}
with optimizer.steps_suspended():
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
assert not [s for s in optimizer.state.values() if len(s)], "a step was made while the engine was built"
if stage < 3:
    for p, b in zip(net.parameters(), before):
        assert torch.equal(p.float(), b.to(p.dtype).float()), "weights moved while the engine was built"
x = torch.randn(4, 8, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
losses = []
for _ in range(5):
    loss = engine(x).float().square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
states = [s for s in optimizer.state.values() if len(s)]
assert states and all(s["step"].item() == 5 and s["exp_avg"].dtype == torch.float32 for s in states), states
print("fine", losses)
from fastft.cli import leave
leave(0)  # gloo's threads may abort an interpreter that shuts down
"""


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "bf16"), (0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")]
)
def test_trap_deepspeed_engine(stage, dtype, tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "engine.py").write_text(ENGINE)
    (output,) = launch.ranks(1, [tmp_path / "engine.py", stage, dtype])
    assert "fine" in output, output[-3000:]


def test_step_hooks_and_the_profiler_see_every_step():
    """torch wraps step() for them; FusedAdamW does it itself, only where one is listening."""
    param = torch.nn.Parameter(torch.ones(8))
    optimizer, seen = FusedAdamW([param]), []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: seen.append("everywhere")),
    ]
    param.grad = torch.ones(8)
    optimizer.step()
    assert seen == ["before", "after", "everywhere"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 3
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#FusedAdamW.step" in {event.name for event in profile.events()}


@pytest.mark.parametrize("sizes", [(1,), (100_003,), (5, 17, 40_000)])
def test_the_short_way_is_the_long_way(sizes):
    """Contiguous float32 on the CPU skips the lists and groups of the general way; a tensor for lr does not."""
    found = []
    for lr in (2.0**-7, torch.tensor(2.0**-7)):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n)) for n in sizes]
        optimizer = FusedAdamW(params, lr=lr, weight_decay=0.1, backend="native")
        for _ in range(3):
            versions = [p._version for p in params]
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step(grad_scale=torch.tensor(0.5), found_inf=torch.zeros(()))
            assert all(p._version > v for p, v in zip(params, versions, strict=True))
        found.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert all(torch.equal(short, long) for short, long in zip(*found, strict=True))


def test_hooks_of_a_subclass_run_once():
    class Mine(FusedAdamW):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    param, seen = torch.nn.Parameter(torch.ones(8)), []
    param.grad = torch.ones(8)
    for kind in (Mine, FusedAdamW):
        optimizer = kind([param])
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append((args[1:], kwargs)))
        optimizer.step()
    assert seen == [((), {})] * 2


def test_a_compiler_takes_the_step_in_one_piece():
    param = torch.nn.Parameter(torch.randn(4, 8))
    optimizer = FusedAdamW([param])
    param.grad = torch.randn(4, 8)
    optimizer.step()
    before = param.detach().clone()
    torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert not torch.equal(before, param)


def test_a_gradient_with_its_sign_in_a_flag():
    found = []
    for flag in (False, True):
        param = torch.nn.Parameter(torch.ones(64))
        param.grad = torch._neg_view(torch.ones(64)) if flag else -torch.ones(64)
        FusedAdamW([param]).step()
        found.append(param.detach().clone())
    assert torch.equal(*found)


def test_a_parameter_twice_in_a_group_is_refused():
    w = torch.nn.Parameter(torch.ones(3))
    for params in ([w, w], [{"params": [w, w]}], [("a", w), ("b", w)]):
        with pytest.raises(ValueError, match="the same parameter twice"):
            FusedAdamW(params, lr=0.1)
    FusedAdamW(iter([w]), lr=0.1)
