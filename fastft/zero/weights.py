"""Whole weights of an engine; those of its checkpoints are in stored.py."""

from collections.abc import Iterator, Mapping

import torch

from fastft.ranks import Ranks


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
