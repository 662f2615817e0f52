"""A model's weights into safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastft.errors import UserError
from fastft.files import fsync
from fastft.zero.parameters import whole_shape

LIMIT = 50_000_000_000  # bytes of a file, as transformers has it
ONE, MANY, INDEX = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"
CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNED = 8  # safetensors: bytes that a header's length is a multiple of


Shapes = dict[str, tuple[int, ...]]


class Layout:
    """Where a model's weights are in the files of ``save_pretrained``; each tied weight once.

    Attributes
    ----------
    files : dict of str
        Name of a weight -> names and shapes of the tensors that it is in the files: one, but for what the model holds
        as one tensor and files do not (experts).
    """

    def __init__(self, model: Any, files: dict[str, Shapes], converted: set[str]):
        self.model, self.files, self.converted = model, files, converted

    @classmethod
    def of(cls, model: Any) -> Layout | None:
        """None: files hold tensors that are made of several of the model's, or nobody can say."""
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        state = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in ignored}
        if any(t.dtype not in CODES for t in state.values()):
            return None
        # Stand-ins whose sizes tell them apart: what a conversion makes of one is another size.
        meta = {n: torch.empty(whole_shape(t), dtype=t.dtype, device="meta") for n, t in state.items()}
        kept = list(remove_tied_weights_from_state_dict(dict(meta), model))
        marks = {name: torch.empty(i + 1, device="meta") for i, name in enumerate(kept)}
        try:
            written = {name: t.numel() - 1 for name, t in _reverted(model, marks).items()}
        except Exception:  # a conversion that cannot be made of these
            written = {}
        if sorted(written.values()) == list(range(len(kept))):
            files = {kept[i]: {name: tuple(meta[kept[i]].shape)} for name, i in written.items()}
            return cls(model, files, set())
        try:
            whole = _reverted(model, {name: meta[name] for name in kept})
            parts = {name: _reverted(model, {name: meta[name]}) for name in kept}
        except Exception:
            return None
        files = {own: {name: tuple(t.shape) for name, t in part.items()} for own, part in parts.items()}
        if [*sorted(n for part in files.values() for n in part)] != sorted(whole):
            return None
        converted = {own for own, part in parts.items() if [*map(id, part.values())] != [id(meta[own])]}
        return cls(model, files, converted)

    def parts(self, own: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that a weight is in the files."""
        if own not in self.converted:
            return dict.fromkeys(self.files[own], tensor)
        return _reverted(self.model, {own: tensor})


def _reverted(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))


def write(
    folder: Path,
    layout: Layout,
    state: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    place: Path,
) -> None:
    """Write safetensors files, and read them back to compare.

    Parameters
    ----------
    state : mapping
        The model's weights by name; each is asked for once, in the order of the files, and let go of.
    dtypes : mapping
        Name in ``state`` -> dtype in the files.
    place : Path
        Where the folder is to be, for errors.

    Raises
    ------
    UserError
        What was read back differs; a weight is NaN or Inf.
    """
    ordered = sorted(layout.files, key=lambda own: min(layout.files[own]))
    names = {name: own for own in ordered for name in sorted(layout.files[own])}
    files = _divided({name: (layout.files[own][name], dtypes[own]) for name, own in names.items()})
    total, where = 0, {}
    now, parts = "", dict[str, torch.Tensor]()
    for i, file_parts in enumerate(files):
        file = folder / (ONE if len(files) == 1 else MANY.format(i + 1, len(files)))
        sums = {}
        with open(file, "wb") as out:
            out.write(header(file_parts))
            for name, (shape, dtype) in file_parts.items():
                if names[name] != now:
                    now, parts = names[name], {}  # let go of the last one first
                    parts = layout.parts(now, state[now])
                tensor = parts.pop(name)
                if tuple(tensor.shape) != tuple(shape):
                    raise UserError(f"{place}: {name} is {tuple(tensor.shape)}, not {tuple(shape)}.")
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    refuse(place, [now])
                data = raw(tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype))
                sums[name] = zlib.crc32(data)
                out.write(data)
                total += len(data)
                where[name] = file.name
        fsync(file)
        _compare(file, sums, place)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def broken(folder: Path) -> str:
    """The first safetensors file of a folder that is not as long as its header says, or is missing though the index
    names it, in words; "": none.
    """
    index = folder / INDEX
    named = set()
    if index.is_file():
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{INDEX} is no index of weights"
    for name in sorted(named | {file.name for file in folder.glob("*.safetensors")}):
        try:
            size = (folder / name).stat().st_size
            with open(folder / name, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                entries = json.loads(file.read(min(length, size)))
            ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        except FileNotFoundError:
            return f"{name} is missing, which {INDEX} names"
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return f"{name} has no header of a safetensors file ({size:,} bytes)"
        if (wanted := 8 + length + max(ends, default=0)) != size:
            return f"{name} has {size:,} bytes, where its header says {wanted:,}"
    return ""


def refuse(folder: Path, bad: list[str]) -> NoReturn:
    """UserError for weights that are no numbers."""
    raise UserError(
        f"{folder}: not written: {', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''} "
        f"{'hold' if len(bad) > 1 else 'holds'} NaN or Inf.",
        "The training diverged; export an older checkpoint with `fastft export --step`.",
    )


def _divided(sizes: dict[str, tuple]) -> list[dict[str, tuple]]:
    """Files of at most LIMIT bytes, unless a single tensor is larger."""
    parts: list[dict[str, tuple]] = [{}]
    filled = 0
    for name, size in sizes.items():
        n = _size(*size)
        if parts[-1] and filled + n > LIMIT:
            parts.append({})
            filled = 0
        parts[-1][name] = size
        filled += n
    return parts


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    n = dtype.itemsize
    for length in shape:
        n *= length
    return n


def header(part: Mapping[str, tuple], **metadata: str) -> bytes:
    """What a file of these tensors begins with, by the format: the length of what follows (8 bytes, little-endian),
    then JSON, padded with blanks.

    ``part``: name -> shape and dtype, in the order of the tensors.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name, (shape, dtype) in part.items():
        end = at + _size(shape, dtype)
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return struct.pack("<Q", len(text)) + text


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in host memory."""
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


def _compare(file: Path, sums: dict[str, int], place: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names: Iterator[str] = iter(opened.keys())
        wrong = [name for name in names if zlib.crc32(raw(opened.get_tensor(name))) != sums.get(name)]
        wrong += sorted(set(sums) - set(opened.keys()))
    if wrong:
        differs(place, wrong)


def differs(place: Path, wrong: list[str]) -> NoReturn:
    """UserError for weights that are not what was written."""
    raise UserError(
        f"{place}: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''} read back differ from what was exported.",
        "The training checkpoint is intact; export again with `fastft export`.",
    )
