"""Run as ranks by test_universal.py: ``universal.py save|load STAGE DTYPE STATE FOLDER``.

A universal checkpoint of a run with another number of ranks.
"""

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from fastft.cli import leave
from fastft.optim import FusedAdamW
from fastft.optim.adamw_state import decoded_state
from fastft.zero import engine as engines


def build(stage: int, dtype: str, state: str, **more):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 11))
    decay, rest = [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim == 1]
    optimizer = FusedAdamW(
        [{"params": decay, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        state_dtype=state,
        seed=3,
    )
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bf16"},
        **more,
    }
    return engines.build_engine(net, optimizer, settings), optimizer


def train(engine, steps: int) -> None:
    """All ranks see the same rows, so that any number of them computes the same gradients."""
    for step in range(steps):
        x = torch.randn(4, 30, generator=torch.Generator().manual_seed(step)).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()


def contents(engine, optimizer) -> dict[str, torch.Tensor]:
    """Masters and moments by name, as float32 numbers."""
    if (
        optimizer.state_dtype == "int8"
    ):  # what DeepSpeed shows are the codes: put the numbers there for it, as after a load
        for values in optimizer.state.values():
            if "exp_avg_scale" in values:
                wide = decoded_state(values)
                values.clear()
                values.update(wide)
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {
        f"{name}.{key}": (safe_get_full_optimizer_state(p, key) if key else safe_get_full_fp32_param(p)).float().clone()
        for name, p in engine.module.named_parameters()
        for key in ("", "exp_avg", "exp_avg_sq")
    }


def main(verb: str, stage: str, dtype: str, state: str, folder: str) -> None:
    engines.start_process_group()
    more = {"checkpoint": {"load_universal": True}} if verb == "load" else {}
    engine, optimizer = build(int(stage), dtype, state, **more)
    if verb == "save":
        train(engine, 5)
        engine.save_checkpoint(folder, tag="five", client_state={"universal_checkpoint_info": {}})
    else:
        engine.load_checkpoint(folder, tag="universal")
    after = contents(engine, optimizer)
    if verb == "load":
        assert all(s["step"] == 5 for s in optimizer.state.values() if len(s))
        train(engine, 1)
        assert {s["exp_avg"].dtype for s in optimizer.state.values() if len(s)} == {
            {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[state]
        }
    if torch.distributed.get_rank() == 0:
        torch.save(after, Path(folder) / f"{verb}.pt")
    engines.stop_process_group()


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    main(*sys.argv[1:])
    leave(0)  # gloo's threads may abort an interpreter that shuts down
