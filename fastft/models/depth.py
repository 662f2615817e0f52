"""How deep in a model each of its parameters is: embeddings, block by block, and what comes after.

Read off the model's structure, not off names of families: the blocks are the members of its longest list of equal
modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastft.errors import UserError
from fastft.lazy import torch

# Parts of names that OPT registers before its blocks and applies after them.
PROJECTED_AFTER = ("final", "project_out")


@dataclass(frozen=True)
class Depths:
    """Depth of every parameter.

    Attributes
    ----------
    of : dict of str
        By the names of ``named_parameters()`` that are trained: 0 embeddings and what else comes before the blocks,
        i + 1 block i, ``top`` what comes after them. A parameter that is in several places, as a tied embedding
        does, has the lowest.
    top : int
        Blocks + 1.
    """

    of: dict[str, int]
    top: int


def depths(model: torch.nn.Module) -> Depths:
    """Depths in a whole model, before ZeRO-3 cuts it up.

    An encoder-decoder has two stacks of blocks: block i of each is at i + 1; of two that are not equally long the last
    blocks are at the same depth.

    Raises
    ------
    UserError
        The model uses layers at several depths (ALBERT); it has no list of blocks, or several; a parameter (named)
        stands neither before, in nor after the blocks.
    """
    kind = type(model).__name__
    stacks = {name: _blocks(stack, name, kind) for name, stack in _stacks(model)}
    blocks = max(len(members) for members in stacks.values())
    _refuse_shared(model, blocks, kind, several=len(stacks) > 1)
    places = _Places(model, stacks, blocks)
    found: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            found.setdefault(id(parameter), set()).add(places.depth(name, kind))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in trained:
        inside = found[id(parameter)] - {0, blocks + 1}
        if len(inside) > 1:
            raise UserError(
                f"{kind}: {name} is used in layers {', '.join(str(d - 1) for d in sorted(inside))}: "
                "it has no one depth.",
                "Remove the parameter grouping that goes by depth.",
            )
    return Depths({name: min(found[id(p)]) for name, p in trained}, blocks + 1)


def _stacks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The parts that have blocks of their own, by their names: encoder and decoder, or the whole model."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        named = sorted(model.named_modules(), key=lambda item: item[0].count("."))
        parts = [
            next(((name, m) for name, m in named if name.split(".")[-1] == part), None)
            for part in ("encoder", "decoder")
        ]
        if found := [part for part in parts if part is not None and _lists(*part)]:
            return found
    return [("", model)]


def _lists(prefix: str, module: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """The lists of modules with parameters, by their names, but for those inside members of another list."""
    found: dict[str, torch.nn.ModuleList] = {}
    for name, part in module.named_modules(prefix=prefix):
        within = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(part, torch.nn.ModuleList) and not within and any(True for _ in part.parameters()):
            found[name] = part
    return found


def _blocks(stack: torch.nn.Module, prefix: str, kind: str) -> dict[str, int]:
    """Names of a stack's blocks, and the number of each."""
    lists = {name: found for name, found in _lists(prefix, stack).items() if len({type(m) for m in found}) == 1}
    longest = max((len(found) for found in lists.values()), default=0)
    names = [name for name, found in lists.items() if len(found) == longest]
    if len(names) != 1:
        what = f"has several lists of {longest} layers ({', '.join(names)})" if names else "has no list of layers"
        raise UserError(
            f"{kind} {what}: the depth of its parameters cannot be told.",
            "Remove the parameter grouping that goes by depth.",
        )
    return {f"{names[0]}.{i}": i for i in range(longest)}


def _refuse_shared(model: torch.nn.Module, blocks: int, kind: str, several: bool) -> None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(config, "num_hidden_layers", None)
    groups = getattr(config, "num_hidden_groups", None)
    if (groups and layers and groups < layers) or (not several and isinstance(layers, int) and layers != blocks):
        raise UserError(
            f"{kind} runs {layers} layers with the parameters of {groups or blocks}: they have no one depth.",
            "Remove the parameter grouping that goes by depth, or choose a model whose layers are its own.",
        )


class _Places:
    """Where names stand: before, in, or after the blocks."""

    def __init__(self, model: Any, stacks: dict[str, dict[str, int]], blocks: int):
        self.top = blocks + 1
        self.blocks = {
            name: i + 1 + blocks - len(members) for members in stacks.values() for name, i in members.items()
        }
        self.others = [name for name in _lists("", model) if not any(b.startswith(f"{name}.") for b in self.blocks)]
        self.modules = dict(model.named_modules())
        self.position = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
        self.first = {  # of each stack, where its blocks begin
            stack: min(i for name, i in self.position.items() if _inside(name, members))
            for stack, members in stacks.items()
        }
        base = getattr(model, "base_model", model)
        self.base = next((name for name, m in self.modules.items() if m is base and m is not model), "")

    def depth(self, name: str, kind: str) -> int:
        if block := _inside(name, self.blocks):
            return self.blocks[block]
        if self.base and not name.startswith(f"{self.base}."):
            return self.top  # a head
        *path, _ = parts = name.split(".")
        module = self.modules[".".join(path)]
        if isinstance(module, torch.nn.Embedding) or any("emb" in part for part in parts):
            return 0
        if other := next((o for o in self.others if name.startswith(f"{o}.")), None):
            linear = any(isinstance(m, torch.nn.Linear) for m in self.modules[other].modules())
            if linear and self._before(name):
                raise UserError(
                    f"{kind}: the depth of {name} cannot be told: {other} is another list of layers than the longest.",
                    "Remove the parameter grouping that goes by depth, or freeze that part (model.freeze).",
                )
        if not self._before(name) or any(part in piece for piece in parts for part in PROJECTED_AFTER):
            return self.top
        if "norm" in ".".join(parts[-2:]).lower() and not other and not any("feature" in part for part in parts):
            raise UserError(
                f"{kind}: the depth of {name} cannot be told: it stands before the layers, and may be used after them.",
                "Remove the parameter grouping that goes by depth.",
            )
        return 0

    def _before(self, name: str) -> bool:
        """Whether it is registered before the blocks of the stack that it belongs to."""
        stack = next((s for s in self.first if s and name.startswith(f"{s}.")), None)
        first = self.first[stack] if stack is not None else min(self.first.values())
        return self.position[name] < first


def _inside(name: str, blocks: dict[str, int]) -> str | None:
    """The block that a parameter is in."""
    parts = name.split(".")
    return next((b for n in range(1, len(parts)) if (b := ".".join(parts[:n])) in blocks), None)
