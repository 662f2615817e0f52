"""Weights rounded to NF4 by training rows, and the file of a run that holds them.

Every rank, a resume and an export read what rank 0 rounded at the start: to round again would give other bits on
another machine, or with another number of threads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import mapped
from fastft.errors import UserError
from fastft.files import replacing, sha256_file
from fastft.lazy import torch
from fastft.models.edits.lora import base_hashes

if TYPE_CHECKING:
    from fastft.assemble import Job
    from fastft.models.edits.quantize import QuantizeSettings
    from fastft.models.gptq import Inputs

log = logging.getLogger(__name__)

FILE = "quantized.safetensors"
ABOUT = "quantized.json"  # of an exported adapter: how its base was rounded, or the hash of the file with the numbers
NEEDED = "The adapter was trained beside the weights in it."
KEYS = {  # of a configuration, by what a file says of itself
    "base": "model.path",
    "seed": "run.seed",
    "dtype": "model.dtype",
    "settings": "model.quantize",
    "whole": "model.lora.train",
    "rows": "data.train",
}
REFITS = 2  # of the scales to the codes
Parts = dict[str, "torch.Tensor"]  # of a layer, by the names that bitsandbytes saves: weight, weight.absmax, ...


def check(model: Any) -> None:
    """UserError where a model cannot be rounded by rows."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"model.quantize.calibrate: {type(model).__name__} has an encoder and a decoder; only models with one of "
            "them are rounded by rows.",
            "Set model.quantize.calibrate to 0.",
        )


def by_rows(
    job: Job, model: Any, layers: Mapping[str, torch.nn.Linear], settings: QuantizeSettings
) -> dict[str, torch.Tensor]:
    """What the file holds, by ``NAME.PART``. The layers' weights are afterwards what they were rounded to."""
    from fastft.models.calibration import walk
    from fastft.models.gptq import Inputs

    found: dict[str, torch.Tensor] = {}
    done: list[str] = []

    def visit(name: str, halves: list[Inputs]) -> None:
        layer = layers[name]
        try:
            parts, numbers = nf4(layer.weight.detach(), halves, settings.block)
        except torch.linalg.LinAlgError:
            raise UserError(
                f"{name}: its weight, or what the rows give it, is not finite; it cannot be rounded by rows.",
                "Look for NaN in the base's weights, or set model.quantize.calibrate to 0.",
            ) from None
        layer.weight.data = numbers
        found.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        done.append(name)
        if len(done) * 10 % len(layers) < 10:
            log.info("model.quantize: %d of %d layers are rounded", len(done), len(layers))

    inputs = job.sample(settings.calibrate)
    if inputs is None:
        raise UserError(
            f"{job.config.run.dir}: holds no {FILE} of this base and these settings of model.quantize.",
            f"Put the file back. {NEEDED}",
        )
    log.info("model.quantize: rounding %d layers by %d training rows", len(layers), settings.calibrate)
    left = walk(model, inputs, layers, visit, _without_padding(inputs, getattr(job.task, "tokenizer", None)))
    if left:
        said = "model.quantize.calibrate: %d layers are rounded by their weights alone: the rows do not reach them, or "
        log.warning(said + "the model calls them several times (%s)", len(left), ", ".join(left[:3]))
    for name in left:  # as if all inputs were alike
        plain = layers[name].weight.data
        visit(name, [Inputs(1, torch.eye(layers[name].in_features))])
        mapped.let_go(plain)
    return found


def room(model: Any, layers: list[torch.nn.Linear], tokens: int) -> dict[str, int]:
    """Bytes that rounding takes beside the weights, about: of rows with so many tokens, and of a layer's matrices."""
    inputs = max(layer.in_features for layer in layers)
    widest = max(inputs, *(layer.out_features for layer in layers))
    # Each row twice. Of a gated MLP's inside three are there at once; of the hidden state the residual, the last norm's
    # input and output, and what a layer is given or gives, in halves, joined, or without padding.
    held = 3 * widest + 6 * model.config.get_text_config().hidden_size
    return {"rows": 2 * tokens * held * next(model.parameters()).element_size(), "matrices": 60 * inputs**2}


def _without_padding(inputs: Mapping[str, Any], tokenizer: Any) -> torch.Tensor | None:
    """(rows, tokens) bool: what is not padding at a row's end; None where the inputs themselves say it, or nothing
    does.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or ids.dim() != 2 or tokenizer is None or (mask is not None and mask.dim() == 2):
        return None
    ends = ids.shape[1] - (ids != tokenizer.pad_token_id).flip(1).int().argmax(1)  # behind the last other token
    return torch.arange(ids.shape[1]) <= ends[:, None]  # one more: it may be the end of a text


def nf4(weight: torch.Tensor, halves: list[Inputs], block: int) -> tuple[Parts, torch.Tensor]:
    """A weight, (out, in), rounded for inputs of which this is known, and the numbers that this stands for.

    ``block``: weights that share a scale.
    """
    from bitsandbytes import functional

    from fastft.models import gptq

    values = functional.get_4bit_type("nf4", device="cpu").float()
    every = gptq.joined(halves)
    wide, moment = gptq.recovered(weight.float(), halves, every), every.moment
    spread = lambda scales: scales.repeat_interleave(block)[: weight.numel()].view_as(wide)
    scales = gptq.scales(wide, moment, values, block)
    codes = gptq.rounded(wide, moment, spread(scales), values)
    for _ in range(REFITS):
        codes = gptq.descended(wide, moment, spread(scales), values, codes)
        scales = gptq.refitted(wide, moment, scales, values, codes)
    ends = torch.zeros(len(scales), block)
    ends[:, 0] = scales
    alone = ends.view(-1)[: weight.numel()].view_as(weight)  # the scales and nothing else: they are quantized, too
    _, state = functional.quantize_4bit(alone, blocksize=block, compress_statistics=True, quant_type="nf4")
    state.dtype = weight.dtype
    stored = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = gptq.descended(wide, moment, spread(stored), values, codes)
    pairs = torch.nn.functional.pad(codes.view(-1), (0, codes.numel() % 2)).view(-1, 2).to(torch.uint8)
    packed = (pairs[:, :1] << 4) | pairs[:, 1:]
    about = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {"weight": packed, **about}, functional.dequantize_4bit(packed, state)


# -- the file ----------------------------------------------------------------------------------------------------------


def described(job: Job) -> dict[str, Any]:
    """What the rounded weights depend on, as JSON; ``rows`` is None where the training data was not opened."""
    model = job.config.model
    lora: Any = model.chosen()["lora"]
    return {
        "base": base_hashes(model.path) or [model.path, getattr(job.model.config, "_commit_hash", None)],
        "seed": job.config.run.seed if model.init == "random" else None,
        "dtype": model.dtype,
        "settings": model.chosen()["quantize"].model_dump(exclude_defaults=True),  # a key added later changes nothing
        "whole": lora.train,
        "rows": job.train.data.key if job.train is not None else None,
    }


def fits(file: Path, said: dict[str, Any]) -> bool:
    """Whether a file is there, of what is described."""
    then = _description(file)
    return then is not None and then == (said if said["rows"] is not None else {**said, "rows": then.get("rows")})


def _description(file: Path) -> dict[str, Any] | None:
    """What a file says of itself; None where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            return json.loads((stored.metadata() or {}).get("fastft", "{}"))
    except (OSError, SafetensorError):
        return None


def keep_what_checkpoints_need(file: Path, said: dict[str, Any]) -> None:
    """UserError where the file is of other weights or settings, and the run has checkpoints that were trained beside
    it.
    """
    if not file.exists() or not any((file.parent / "checkpoints").glob("step-*")):
        return
    if (then := _description(file)) is None:
        raise UserError(f"{file}: cannot be read.", f"Put it back from a copy. {NEEDED}")
    other = ", ".join(KEYS[name] for name in said if said[name] != then.get(name))
    raise UserError(
        f"{file}: was made with another {other}. The run's checkpoints were trained beside it.",
        "Resume with the model and the settings that the run began with, or start a new run.",
    )


def write(file: Path, said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}  # the table of values is shared
    with replacing(file) as scratch:
        save_file(tensors, scratch, metadata={"fastft": json.dumps(said)})  # of several their order would vary


def about(folder: Path) -> dict[str, Any]:
    """What an exported adapter's ABOUT says. UserError where the file in it is not the one that was exported."""
    path, file = folder / ABOUT, folder / FILE
    again = f"Export the adapter again. {NEEDED}"
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: is missing or cannot be read.", again) from None
    if not isinstance(said, dict) or ("format" in said) == isinstance(said.get(FILE), str):
        raise UserError(f"{path}: says neither how the base was rounded nor which file holds its weights.", again)
    if "format" in said:
        return said
    if not file.is_file():
        raise UserError(f"{file}: is missing.", f"Put it back, or export the adapter again. {NEEDED}")
    if sha256_file(file) != said[FILE]:
        raise UserError(f"{file}: is not the file that the adapter was exported with.", f"Export it again. {NEEDED}")
    return said


def read(file: Path) -> Iterator[tuple[str, Parts]]:
    """Layers and their parts, one layer after the other. UserError for a file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, "pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: cannot be read: {e}", f"Copy it anew, or export again. {NEEDED}") from None
    with opened as stored:
        names = sorted(stored.keys())
        for layer in [name.removesuffix(".weight") for name in names if name.endswith(".weight")]:
            own = [name for name in names if name.startswith(f"{layer}.")]
            yield layer, {name.removeprefix(f"{layer}."): stored.get_tensor(name) for name in own}


def numbers(parts: Parts) -> torch.Tensor:
    """(out, in): what a layer's parts stand for."""
    from bitsandbytes import functional

    about = {name: tensor for name, tensor in parts.items() if name != "weight"}
    state = functional.QuantState.from_dict(about, torch.device("cpu"))
    return functional.dequantize_4bit(parts["weight"], state)
