"""What a checkpoint holds, whatever ranks and ZeRO stage wrote it: parameters and optimizer state by name.

Stages 1 and 2 lay the parameters of a group end to end and cut the whole into a part per rank; stage 3 cuts every
parameter, and a rank's flat tensors hold its piece of each. The tensors of the files are mapped: what is not asked for
is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from fastft.errors import UserError
from fastft.zero import state_files

MASTER = "master"  # the key of the weights that the optimizer updates


@dataclass(frozen=True)
class Place:
    """Where a trained parameter is: from ``start`` in every element's order of flat tensor ``flat``."""

    flat: int
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Stored:
    """A verified checkpoint.

    Parameters
    ----------
    folder : Path
        DeepSpeed's folder in it.
    stage, world : int
        ZeRO stage and number of ranks that wrote it.
    """

    def __init__(self, folder: Path, stage: int, world: int):
        self.folder, self.stage, self.world = folder, stage, world
        self._read: dict[str, Any] = {}

    def module(self, rank: int = 0) -> dict[str, Any]:
        """Weights as the model holds them (at stage 3 this rank's) and the engine's counters."""
        name = f"zero_pp_rank_{rank}_mp_rank_00" if self.stage == 3 else "mp_rank_00"
        return self._file(f"{name}_model_states")

    def optimizer(self, rank: int = 0) -> dict[str, Any]:
        """The ZeRO optimizer's state of a rank. Stages 1-3."""
        return self._file(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states")["optimizer_state_dict"]

    def base(self, rank: int = 0) -> dict[str, Any]:
        """State dict of the optimizer that ZeRO shards. Stages 1-3."""
        return self.optimizer(rank)["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]

    @cached_property
    def places(self) -> dict[str, Place]:
        """Of every trained parameter, by name. Stages 1-3."""
        found = {}
        aligned = self.optimizer().get("param_alignment_paddings")
        for flat, shapes in enumerate(self.module()["param_shapes"]):
            start = 0
            for i, (name, shape) in enumerate(shapes.items()):
                found[name] = place = Place(flat, start, tuple(shape))
                start += (
                    self._share(place.numel) if self.stage == 3 else place.numel + (aligned[flat][i] if aligned else 0)
                )
        return found

    def flat(self, rank: int, flat: int, key: str) -> torch.Tensor:
        """A rank's part of a flat tensor: the weights that the optimizer updates (MASTER), or its state ``key``."""
        if key == MASTER:
            name = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
            return self.optimizer(rank)[name][flat]
        return self.state(flat, rank)[key]

    def state(self, flat: int, rank: int = 0) -> dict[str, Any]:
        """All that the optimizer keeps of a flat tensor; empty before its first step."""
        base = self.base(rank)
        ids = [i for group in base["param_groups"] for i in group["params"]]
        return base["state"].get(ids[flat], {})

    def piece(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a trained parameter or its state, 1-dim, in the dtype of the file."""
        place, parts = self.places[name], []
        if self.stage == 3:
            size, before, offset = self._share(place.numel), 0, place.start
        else:
            size, before, offset = self._part(place.flat), place.start, 0
        at, end = before + start, before + stop
        while at < end:  # a rank's part after another
            rank = at // size
            until = min(end, (rank + 1) * size)
            own = self.flat(rank, place.flat, key)
            parts.append(own[offset + at - rank * size : offset + until - rank * size])
            at = until
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else self.flat(0, place.flat, key)[:0]

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Whole weights by name, each made when it is asked for: under ZeRO 1-3 those that the optimizer updates."""
        return _Weights(self)

    def _share(self, numel: int) -> int:
        """Stage 3: what each rank has of a parameter, the last one with padding."""
        return -(-numel // self.world)

    def _part(self, flat: int) -> int:
        """Stages 1 and 2: what each rank has of a flat tensor. The padding at its end is not in the file."""
        first = self.optimizer()
        return first["single_partition_of_fp32_groups"][flat].numel() + first["group_paddings"][flat]

    def _file(self, pattern: str) -> dict[str, Any]:
        if pattern not in self._read:
            found = [p for s in (state_files.SUFFIX, state_files.OLDER) for p in self.folder.glob(pattern + s)]
            if not found:
                raise FileNotFoundError(f"{self.folder / pattern}{state_files.SUFFIX} is missing")
            self._read[pattern] = state_files.read(found[0])
        return self._read[pattern]


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """UserError for a state whose parts do not fit together, as a forged one's."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as e:
        if isinstance(e, UserError):
            raise
        reason = f"{type(e).__name__}: {str(e).strip()[:200]}"
        raise UserError(f"{folder}: holds no whole weights ({reason}).", "Take another checkpoint: --step.") from None


class _Weights(Mapping[str, torch.Tensor]):
    def __init__(self, stored: Stored):
        with _fitting(stored.folder):
            self._open(stored)

    def _open(self, stored: Stored) -> None:
        self.stored = stored
        one = stored.module()
        self.module = one["module"]
        self.trained = stored.places if stored.stage else {}
        self.tied = (one.get("shared_params") or {}) if stored.stage else {}
        # Stage 3 leaves an empty tensor in a parameter's place, and keeps what is not trained beside it.
        self.frozen = (one.get("frozen_param_shapes") or {}) if stored.stage == 3 else {}
        left_out = set()
        if stored.stage == 3:
            left_out = set(self.module) - {*self.trained, *self.tied, *self.frozen, *one["buffer_names"]}
        self.names = {name: None for name in {**self.module, **self.trained, **self.frozen} if name not in left_out}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        with _fitting(self.stored.folder):
            return self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        stored, name = self.stored, self.tied.get(name, name)
        if name in self.trained:
            place = self.trained[name]
            return stored.piece(name, MASTER, 0, place.numel).view(place.shape)
        if name in self.frozen:
            shape = tuple(self.frozen[name])
            parts = [stored.module(rank)["frozen_param_fragments"][name] for rank in range(stored.world)]
            return torch.cat(parts)[: prod(shape)].view(shape)
        return self.module[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
