"""A model that is being made or edited, of which each rank keeps its part alone: random starts for ZeRO-3."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastft.models import deferred

SMALL = 1 << 10  # elements: what has fewer stays whole until the engine's shards are made
# What torch answers without a look at the values.
METADATA = {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device", "requires_grad_"}
METADATA |= {"is_floating_point", "is_complex", "is_contiguous", "__len__", "__hash__", "type"}
VIEWS = {"data", "T", "mT", "H", "mH", "real", "imag"}  # attributes that are values
# What writes to all of its first argument without a look at what is there.
OVERWRITES = {"normal_", "uniform_", "zero_", "fill_", "constant_", "kaiming_uniform_", "xavier_uniform_"}


class Making(TorchFunctionMode):
    """Keep this rank's part of every parameter, and make one whole for as long as it is used.

    Constructors and initializers run in their order on whole tensors, and draw from torch's generator what they draw
    for a model that is whole: the numbers are the same, on any number of ranks. While this is active, the parameters of
    a module are cut as soon as another module takes it in. A parameter that is cut has its shape, dtype and device, and
    memory for one element; where a function of torch takes it, its parts are gathered first, unless all of it is
    written. All ranks must run the same code. ``shard`` ends it.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device  # that the ranks' parts are sent through
        self.opened: dict[int, tuple[torch.Tensor, list[weakref.ref]]] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.close(force=True)

    @contextmanager
    def constructing(self) -> Iterator[None]:
        """Cut what is put into a module, too."""
        hook = torch.nn.modules.module.register_module_module_registration_hook(self._taken)
        try:
            with self:
                yield
        finally:
            hook.remove()

    def _taken(self, owner: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        self.close()
        for parameter in module.parameters() if module is not None else ():
            if id(parameter) not in self.opened:
                cut(parameter)

    def hold(self, model: torch.nn.Module) -> None:
        """Have deferred parameters (``fastft.models.deferred``) read only part by part, and cut those that were drawn;
        what is small is read.
        """
        for places, source in deferred.found(model):
            tensor: torch.Tensor
            if not isinstance(source, torch.nn.Parameter):
                tensor = deferred.whole(source)
            elif source.numel() < SMALL or not source.is_floating_point():
                tensor = torch.nn.Parameter(deferred.whole(source), source.requires_grad)
            else:
                shape = torch.empty((), dtype=source.dtype).expand(source.shape)
                tensor = torch.nn.Parameter(shape, source.requires_grad)
                _put(tensor, Held(source))
            tensor.__dict__.update({k: v for k, v in vars(source).items() if k not in deferred.OWN})
            for group, name in places:
                group[name] = tensor
        for parameter in model.parameters():
            cut(parameter)

    def cast(self, parameter: torch.Tensor, dtype: torch.dtype) -> None:
        """Another dtype for a parameter of ``hold``."""
        part = held(parameter)
        if part is None:
            parameter.data = parameter.data.to(dtype)
            return
        part.source = part.source.to(dtype)
        parameter.data = torch.empty((), dtype=dtype, device=parameter.device).expand(parameter.shape)
        _put(parameter, part)

    def close(self, keep: Iterable[torch.Tensor] = (), force: bool = False) -> None:
        """Cut what was made whole, but for what a view of it can still be written through."""
        kept = {id(parameter) for parameter in keep}
        for key, (parameter, views) in list(self.opened.items()):
            if force or (key not in kept and all(view() is None for view in views)):
                del self.opened[key]
                cut(parameter)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _asks_for_metadata(func):
            return func(*args, **kwargs)
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and held(t) is not None]
        if taken:
            self.close(keep=taken)
        for tensor in {id(t): t for t in taken}.values():
            self._open(tensor, not _overwrites(func, args, kwargs, tensor))
        result = func(*args, **kwargs)
        if self.opened:
            self._watch(result)
        return result

    def _open(self, parameter: torch.Tensor, fill: bool) -> None:
        part = held(parameter)
        assert part is not None
        empty = lambda: torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        whole = part.whole(parameter, self.device) if fill else empty()
        parameter.data = whole
        del parameter.fastft_held  # type: ignore[attr-defined]
        self.opened[id(parameter)] = (parameter, [])

    def _watch(self, result: Any) -> None:
        """Note the views of what is open."""
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or id(tensor) in self.opened or tensor.device.type == "meta":
                continue
            for parameter, views in self.opened.values():
                if tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
                    views.append(weakref.ref(tensor))


class Held:
    """What a parameter that is cut is made of: this rank's part, or all of it (deferred, of files)."""

    def __init__(self, source: torch.Tensor, part: bool = False):
        self.source, self.part = source, part

    def whole(self, parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Of the parameter's shape and dtype; all ranks ask for it together."""
        if not self.part:
            return deferred.whole(self.source).to(parameter.dtype)
        world = torch.distributed.get_world_size()
        own = self.source.to(device).view(torch.uint8)
        every = torch.empty(own.numel() * world, dtype=torch.uint8, device=device)
        torch.distributed.all_gather_into_tensor(every, own)
        flat = every.view(parameter.dtype)[: parameter.numel()]
        return flat.view(parameter.shape).to(parameter.device)

    def into(self, part: torch.Tensor) -> None:
        """Copy this rank's part into a tensor of its size, in that one's dtype."""
        with torch.no_grad():
            if self.part:
                part.copy_(self.source)
                return
            size = self.source.numel()
            begin = min(torch.distributed.get_rank() * part.numel(), size)
            end = min(begin + part.numel(), size)
            if begin == end:
                return
            source, row = deferred.plain(self.source, part.dtype), size // self.source.shape[0]
            first = begin // row
            own = deferred.rows(source, first, -(-end // row)).reshape(-1)[begin - first * row : end - first * row]
            part[: own.numel()].copy_(own)


def held(tensor: torch.Tensor) -> Held | None:
    """None: the tensor is whole."""
    return getattr(tensor, "fastft_held", None)


def cut(parameter: torch.Tensor) -> None:
    """Keep this rank's part of a parameter, as ZeRO-3 divides it: as much on every rank, the last ones padded."""
    if parameter.numel() < SMALL or parameter.device.type == "meta" or held(parameter) is not None:
        return
    size = -(-parameter.numel() // torch.distributed.get_world_size())
    part = torch.zeros(size, dtype=parameter.dtype, device=parameter.device)
    Held(parameter.data).into(part)
    _put(parameter, Held(part, part=True))


def _put(parameter: torch.Tensor, source: Held) -> None:
    parameter.data = torch.empty(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    parameter.fastft_held = source  # type: ignore[attr-defined]


def _asks_for_metadata(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):  # of an attribute
        return getattr(getattr(func, "__self__", None), "__name__", "") not in VIEWS
    return name in METADATA


def _overwrites(func: Callable, args: tuple, kwargs: dict, tensor: torch.Tensor) -> bool:
    name = getattr(func, "__name__", "")
    first = args[0] if args else kwargs.get("tensor")
    if name == "__set__":
        return first is tensor and args[1] is not tensor
    if name == "copy_" and len(args) > 1:
        return first is tensor and args[1] is not tensor
    return first is tensor and name in OVERWRITES
