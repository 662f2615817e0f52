"""Whole weights, from an engine or from its checkpoints."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from fastft.zero import pickles


def consolidated(engine, main: bool) -> dict[str, torch.Tensor] | None:
    """The engine's weights by name on rank 0, in their own dtype; all ranks take part (under ZeRO-3 they gather)."""
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict()  # named so, but it keeps the parameters' own dtype
    return engine.module.state_dict() if main else None


def of_checkpoint(path: Path, tag: str, stage: int) -> dict[str, torch.Tensor]:
    """The weights in a verified checkpoint by name: under ZeRO 1-3 the float32 masters."""
    if stage:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with redirect_stdout(sys.stderr):  # it prints as it goes
            state = dict(get_fp32_state_dict_from_zero_checkpoint(str(path), tag=tag))
        if stage == 3:
            return state
        # It knows trained parameters and, but for stage 1, frozen ones; the module's own file has them all.
        return {**_module(path / tag), **state}
    return _module(path / tag)


def _module(folder: Path) -> dict[str, torch.Tensor]:
    return pickles.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")["module"]
