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


def names_in_files(model: Any) -> dict[str, str] | None:
    """Names of a model's weights, by those that they have in the files of ``save_pretrained``; each tied weight once.

    None: files hold other tensors than the model does (experts that it has fused), or nobody can say.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in ignored}
    if any(t.dtype not in CODES for t in state.values()):
        return None
    # Stand-ins whose sizes tell them apart: what a conversion makes of one is another size.
    meta = {n: torch.empty(whole_shape(t), dtype=t.dtype, device="meta") for n, t in state.items()}
    kept = list(remove_tied_weights_from_state_dict(meta, model))
    marks = {name: torch.empty(i + 1, device="meta") for i, name in enumerate(kept)}
    try:
        written = revert_weight_conversion(model, dict(marks))
    except Exception:  # a conversion that cannot be made of these
        return None
    found = {name: t.numel() - 1 for name, t in written.items()}
    if sorted(found.values()) != list(range(len(kept))):
        return None
    return {name: kept[i] for name, i in found.items()}


def write(
    folder: Path,
    names: Mapping[str, str],
    state: Mapping[str, torch.Tensor],
    like: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    place: Path,
) -> None:
    """Write safetensors files, and read them back to compare.

    Parameters
    ----------
    names : mapping
        Name in the files -> name in ``state``.
    state : mapping
        Its tensors are asked for once each, in the order of the files, and let go of.
    like : mapping
        Name in ``state`` -> shape and dtype in the files.
    place : Path
        Where the folder is to be, for errors.

    Raises
    ------
    UserError
        What was read back differs; a weight is NaN or Inf.
    """
    parts = _divided({name: like[own] for name, own in sorted(names.items())})
    total, where = 0, {}
    for i, part in enumerate(parts):
        file = folder / (ONE if len(parts) == 1 else MANY.format(i + 1, len(parts)))
        sums = {}
        with open(file, "wb") as out:
            out.write(header(part))
            for name, (shape, dtype) in part.items():
                tensor = state[names[name]]
                if tuple(tensor.shape) != tuple(shape):
                    raise UserError(f"{place}: {name} is {tuple(tensor.shape)}, not {tuple(shape)}.")
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    refuse(place, [names[name]])
                data = raw(tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype))
                sums[name] = zlib.crc32(data)
                out.write(data)
                total += len(data)
                where[name] = file.name
        fsync(file)
        _compare(file, sums, place)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
