"""Tensors of files that are computed when they are asked for, so that a model is loaded without holding its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
OWN = {"step", "shared", "_is_param"}  # attributes that another tensor in its place has not
CONVERSIONS = {aten._to_copy.default, aten.detach.default, aten.alias.default}
SAME_ROWS = {aten.clone.default, *CONVERSIONS}


class Step:
    """How a tensor is computed: a function of torch and its arguments, steps in place of what is deferred; ``func`` is
    None for a tensor that is there, ``args[0]``. ``like``, on the meta device, has its shape and dtype.
    """

    __slots__ = ("args", "func", "kwargs", "like")

    def __init__(self, like: torch.Tensor, func: Any, args: tuple, kwargs: dict | None = None):
        self.like, self.func, self.args, self.kwargs = like, func, args, kwargs or {}

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Step:
        return cls(torch.empty_like(tensor, device="meta"), None, (tensor,))

    def whole(self) -> torch.Tensor:
        if self.func is None:
            return self.args[0]
        return self.func(*tree_map(whole, self.args), **tree_map(whole, self.kwargs))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``[start:stop]`` of the first dimension, computed of as little as that takes: of experts in files of their
        own, stacked and joined, those alone.
        """
        dims, args, func = self.like.dim(), self.args, self.func
        if start >= stop:
            return torch.empty((0, *self.like.shape[1:]), dtype=self.like.dtype)
        if func is None:
            return args[0][start:stop]
        if func in SAME_ROWS:
            return func(rows(args[0], start, stop), *args[1:], **self.kwargs)
        if func is aten.transpose.int and 0 not in (args[1] % dims, args[2] % dims):
            return func(rows(args[0], start, stop), *args[1:])
        if func in (aten.cat.default, aten.stack.default):
            parts, dim = args[0], self.kwargs.get("dim", args[1] if len(args) > 1 else 0) % dims
            if dim:  # of the stacked tensors, one less: the rows come before it
                return func([rows(part, start, stop) for part in parts], dim)
            if func is aten.stack.default:
                return func([whole(part) for part in parts[start:stop]])
            found, begin = [], 0
            for part in parts:
                end = begin + len(part.like)
                if begin < stop and end > start:
                    found.append(rows(part, max(start - begin, 0), min(stop, end) - begin))
                begin = end
            return func(found)
        return self.whole()[start:stop]


class Deferred(torch.Tensor):
    """A tensor of a file that is mapped, or what functions of torch make of such: its shape and dtype are there, its
    values are computed when they are asked for. What cannot be put off (a function that looks at values, a number that
    is drawn, what is made of a plain tensor, too) is computed at once, and is a plain tensor.

    Attributes
    ----------
    step : Step
        What computes it.
    shared : bool
        Whether something else sees what is written to it: a file's tensor, a view, one that another was made of.
    """

    step: Step
    shared: bool
    written: ClassVar[bool] = False  # since from_files began: what reads it later could tell

    @staticmethod
    def __new__(cls, step: Step) -> Deferred:
        like, cpu = step.like, torch.device("cpu")
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=cpu
        )
        made.step = step
        made.shared = step.func is None or any(r.alias_info is not None for r in step.func._schema.returns)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Deferred:
        return cls(Step.of(tensor))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func != torch.Tensor.data.__set__:  # type: ignore[attr-defined]
                return func(*args, **(kwargs or {}))
            target, source = args
            if not (isinstance(target, Deferred) and isinstance(source, Deferred)):
                cls.written = True
                raise RuntimeError("data of a weight that is not read yet, or for one, among others that are")
            func(target, source)
            target.step, target.shared, source.shared = source.step, True, True

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        written = [t for t in _written(func, args, kwargs) if isinstance(t, Deferred)]
        if any(t.shared for t in written):
            cls.written = True
            raise RuntimeError(f"{func} writes to a weight of a file that is not read yet")
        for t in written:
            t.step = Step.of(t.step.whole())
        if _can_wait(func, args, kwargs):
            try:
                likes, named = tree_map(_like, (args, {k: v for k, v in kwargs.items() if k != "device"}))
                result = func(*likes, **named)
            except (RuntimeError, NotImplementedError):  # it looks at values
                result = None
            several = isinstance(result, tuple | list) and all(isinstance(t, torch.Tensor) for t in result)
            if several or isinstance(result, torch.Tensor):
                for t in tree_leaves((args, kwargs)):
                    if isinstance(t, Deferred):
                        t.shared = True
                steps = tree_map(lambda t: t.step if isinstance(t, Deferred) else t, (args, kwargs))
                if not several:
                    return cls(Step(result, func, *steps))
                return type(result)(cls(Step(like, _Part(func, i), *steps)) for i, like in enumerate(result))
        result = func(*tree_map(whole, args), **tree_map(whole, kwargs))
        return next((t for t in written if t.step.args[0] is result), result)  # func_(t) returns t


def whole(value: Any) -> Any:
    """The tensor itself, of one that is deferred or of a step; anything else as it is."""
    value = value.step if isinstance(value, Deferred) else value
    return value.whole() if isinstance(value, Step) else value


def rows(value: Any, start: int, stop: int) -> torch.Tensor:
    value = value.step if isinstance(value, Deferred) else value
    return value.rows(start, stop) if isinstance(value, Step) else value[start:stop]


def plain(value: Any, dtype: torch.dtype) -> Any:
    """The tensor or step from before a conversion to ``dtype``, for what will convert it there."""
    value = value.step if isinstance(value, Deferred) else value
    while isinstance(value, Step) and value.like.dtype == dtype and value.func in CONVERSIONS:
        value = value.args[0]
    return value


def found(model: torch.nn.Module) -> list[tuple[list[tuple[dict, str]], Deferred]]:
    """Each tensor of a model that is deferred, behind the places where it stands."""
    places: dict[int, tuple[list[tuple[dict, str]], Deferred]] = {}
    for module in model.modules():
        for group in (module._parameters, module._buffers, vars(module)):
            for name, tensor in group.items():
                if isinstance(tensor, Deferred):
                    places.setdefault(id(tensor), ([], tensor))[0].append((group, name))
    return list(places.values())


class _Part:
    """One of the tensors that a function returns."""

    def __init__(self, func: Any, index: int):
        self.func, self.index, self._schema = func, index, func._schema

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.func(*args, **kwargs)[self.index]


class _Slice:
    """Of safetensors: a tensor of a file, which transformers asks for by ``[...]``."""

    def __init__(self, found: Any):
        self._found = found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        found = self._found[index]
        return Deferred.of(found) if index is Ellipsis else found


@contextlib.contextmanager
def from_files() -> Iterator[None]:
    """While this is active, from_pretrained of transformers leaves weights and saved buffers deferred: in whichever
    dtype a file has them, they are mapped, and names, conversions and dtypes are those of a load without this. Where
    the model's class writes to a weight that was loaded, ``Deferred.written`` is True, and the model is not to be used.
    """
    from transformers import modeling_utils

    Deferred.written = False
    opened, loaded = modeling_utils.safe_open, modeling_utils.load_state_dict

    class File:
        def __init__(self, *args: Any, **kwargs: Any):
            self._file = opened(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_slice(self, name: str) -> _Slice:
            return _Slice(self._file.get_slice(name))

        def __enter__(self) -> File:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

    def load_state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:  # of files that torch.save wrote
        defer = lambda value: Deferred.of(value) if isinstance(value, torch.Tensor) and not value.is_meta else value
        return {name: defer(value) for name, value in loaded(*args, **kwargs).items()}

    loader: Any = modeling_utils
    loader.safe_open, loader.load_state_dict = File, load_state_dict
    try:
        yield
    finally:
        loader.safe_open, loader.load_state_dict = opened, loaded


def _written(func: Any, args: tuple, kwargs: dict) -> list:
    """What a function writes to."""
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _can_wait(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the same would come of it later: nothing is drawn or written, and no plain tensor can be until then."""
    device = kwargs.get("device")
    others = any(isinstance(t, torch.Tensor) and not isinstance(t, Deferred) for t in tree_leaves((args, kwargs)))
    fixed = not func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags and not others
    return fixed and (device is None or torch.device(device).type == "cpu")


def _like(value: Any) -> Any:
    return value.step.like if isinstance(value, Deferred) else value
