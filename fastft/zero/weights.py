"""Whole weights, from an engine or from its checkpoints."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import torch

from fastft.ranks import Ranks
from fastft.zero import pickles


class Gathered(Mapping[str, torch.Tensor]):
    """A ZeRO-3 engine's weights by name, in their own dtype, each gathered when rank 0 asks for it: nobody holds more
    than one. All ranks make this together; the others then ``follow`` until rank 0 has closed it.
    """

    def __init__(self, engine, ranks: Ranks):
        self.ranks, self.own = ranks, engine.module.state_dict(keep_vars=True)

    def __getitem__(self, name: str) -> torch.Tensor:
        self.own[name]  # a KeyError is rank 0's alone
        self.ranks.from_main(name)
        return self._gather(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def follow(self) -> None:
        while (name := self.ranks.from_main(None)) is not None:
            self._gather(name)

    def close(self) -> None:
        self.ranks.from_main(None)

    def _gather(self, name: str) -> torch.Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        tensor = self.own[name]
        if not hasattr(tensor, "ds_id"):
            return tensor.detach()
        with GatheredParameters([tensor]):
            return tensor.detach().cpu().clone() if self.ranks.main else tensor.detach()[:0]


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
