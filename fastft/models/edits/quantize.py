"""A base in 4 or 8 bits for LoRA (QLoRA: Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import fnmatch
import functools
import json
import logging
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fastft import mapped, rooms
from fastft.config import Config, Section
from fastft.errors import UserError
from fastft.files import sha256_file
from fastft.lazy import torch
from fastft.models.edits import _rounding as rounding
from fastft.models.edits.base import Edit, Lazy, State, inner_linears

if TYPE_CHECKING:
    from fastft.assemble import Job

log = logging.getLogger(__name__)

SMALL = 16  # a layer with fewer outputs stays as it is: a gate


class QuantizeSettings(Section):
    """How the frozen weights are kept."""

    scalar: ClassVar = "format"

    format: Literal["nf4", "int8"] = Field(
        description="nf4: 4-bit normal floats in blocks, whose scales are quantized, too. int8: a scale for each row. "
        "Needs model.lora, and parallel.zero 0 to 2.",
    )
    block: Literal[32, 64] = Field(
        64,
        description="Weights that share a scale in nf4. 64: 0.52 bytes a weight. 32: 0.53 bytes, and closer to the "
        "weights.",
    )
    calibrate: int = Field(
        0,
        ge=0,
        description="Training rows by which nf4 is rounded (GPTQ, GPTAQ, QuantEase): so that a layer's outputs change "
        "least on them, and not its weights. Each goes twice through the model, all at once, on the CPU. 0: by the "
        "weights alone.",
    )

    def check(self, config: Config) -> None:
        lora: Any = config.model.chosen().get("lora")
        if lora is None:
            raise ValueError(
                "model.quantize: a base in few bits cannot be trained itself: add model.lora, or leave it out"
            )
        if lora.dora:
            raise ValueError("model.quantize and model.lora.dora: DoRA's norms need the base's weights as numbers")
        if self.format == "int8" and config.model.dtype == "fp32":
            raise ValueError(
                "model.quantize: int8 computes with inputs in 16 bits, which a model in fp32 may exceed: set "
                "model.dtype: bf16"
            )
        if self.block != 64 and self.format != "nf4":
            raise ValueError("model.quantize.block: only nf4 has blocks: leave it out, or set format: nf4")
        if self.calibrate and self.format != "nf4":
            raise ValueError("model.quantize.calibrate: only nf4 is rounded by rows: set it to 0, or format: nf4")
        if self.calibrate and config.model.attention == "flash_attention_2":
            raise ValueError(
                "model.quantize.calibrate: rounding takes place on the CPU, where model.attention: flash_attention_2 "
                "does not run: leave model.attention at auto"
            )
        if config.parallel.zero == 3:
            raise ValueError(
                "model.quantize: parallel.zero: 3 would cut the blocks that share a scale: set parallel.zero to 0, 1 "
                "or 2"
            )

    @property
    def bytes(self) -> float:
        """Of a weight, with the scales of its block: 8 bits, and a float32 for 256 of them."""
        return 0.5 + 1 / self.block + 4 / (self.block * 256) if self.format == "nf4" else 1.0


@rooms.EDITS.register("quantize")
class Quantize(Edit):
    """The linear layers of the base, but for heads and whatever is tied, in 4 or 8 bits."""

    Settings = QuantizeSettings
    order = 0

    def __init__(self, settings: QuantizeSettings, config: Config):
        super().__init__(settings, config)
        self.job: Job | None = None
        self.file: Path | None = None  # of the rounded weights, where rows decided

    def see(self, job: Job) -> None:
        self.job = job

    def apply(self, model: torch.nn.Module, heads: tuple[str, ...]) -> None:
        if next(model.parameters()).device.type != "meta":
            bitsandbytes()
        times = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        found: list[tuple[str, Any]] = [(name, model.get_submodule(name)) for name in inner_linears(model, heads)]
        lora: Any = self.config.model.chosen().get("lora")
        trained = [f"{name}.weight" for name, _ in found]  # in full, beside the adapter
        trained = [name for pattern in lora.train for name in fnmatch.filter(trained, pattern)] if lora else []
        found = [
            (name, m)
            for name, m in found
            if type(m) is torch.nn.Linear
            and times[id(m.weight)] == 1
            and m.out_features >= SMALL
            and f"{name}.weight" not in trained
        ]
        self.layers = [name for name, _ in found]
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        if not self.layers:
            raise UserError(f"model.quantize: {type(model).__name__} has no linear layer that could be quantized.")
        if self.settings.calibrate:
            rounding.check(model)
        self.whole = sum(p.nbytes for p in model.parameters())
        if found[0][1].weight.is_meta:  # of a plan, which asks for sizes alone
            for _, layer in found:
                layer.weight.requires_grad_(False)
                layer.weight.stored_bytes = int(self.settings.bytes * layer.weight.numel())
        elif self.settings.calibrate:
            self._by_rows(model, dict(found))
        else:
            for name, layer in found:
                put(model, name, quantized(layer, self.settings))
                mapped.let_go(layer.weight)
        self._say_what_stays_whole(model)

    def making(self, model: torch.nn.Module, width: int, rows: int | None) -> dict[str, dict[str, int]]:
        if not self.settings.calibrate:
            return {}
        layers: list[Any] = [model.get_submodule(name) for name in self.layers]
        rows = min(self.settings.calibrate, rows or self.settings.calibrate)
        return {"rounding": {"weights": self.whole, **rounding.room(model, layers, rows * width)}}

    def _by_rows(self, model: Any, layers: dict[str, torch.nn.Linear]) -> None:
        """What rank 0 rounded, or what the run has from its start: sums of another machine, or of another number of
        threads, would round otherwise.
        """
        assert self.job is not None
        ranks, self.file = self.job.ranks, Path(self.config.run.dir) / rounding.FILE
        with ranks.main_alone():
            if ranks.main and not rounding.fits(self.file, said := rounding.described(self.job)):
                rounding.keep_what_checkpoints_need(self.file, said)
                rounding.write(self.file, said, rounding.by_rows(self.job, model, layers, self.settings))
        for name, parts in rounding.read(self.file):
            put(model, name, quantized(layers[name], self.settings, parts))
            mapped.let_go(layers[name].weight)

    def _say_what_stays_whole(self, model: Any) -> None:
        """Warn of weights that are neither in few bits nor of an embedding or head, where they are many: experts that
        the model holds as one tensor.
        """
        from fastft.models.head import input_embedding

        ends = [input_embedding(model), model.get_output_embeddings()] if hasattr(model, "can_generate") else []
        known = {id(p) for end in ends if end is not None for p in end.parameters()}
        rest = {name: p for name, p in model.named_parameters() if p.is_floating_point() and id(p) not in known}
        rest = {name: p for name, p in rest.items() if p.dim() >= 2 and not hasattr(p, "stored_bytes")}
        few = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in rest.values())
        whole = sum(p.numel() for p in rest.values())
        if whole > 0.1 * (few + whole):
            largest = max(rest, key=lambda name: rest[name].numel())
            log.warning(
                "model.quantize: %d weights of %d tensors stay as they are, for they are no linear layers (%s)",
                whole,
                len(rest),
                largest,
            )

    def state(self) -> dict[str, Any]:
        state = self.record()["quantize"]
        if self.file is not None:
            state["sha256"] = sha256_file(self.file)
        return state

    def check_state(self, state: dict[str, Any]) -> str:
        now = self.state()
        if self.file is not None and {**state, "sha256": 0} == {**now, "sha256": 0} and state != now:
            return f"{self.file} holds other weights than the adapter was trained on."
        names = sorted({*state, *now} - {"sha256"})
        then, here = (
            {name: said.get(name) for name in names if state.get(name) != now.get(name)} for said in (state, now)
        )
        return "" if state == now else f"model.quantize was {_told(then)}, and is {_told(here)}."

    def write(self, state: State, model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> bool:
        """What the base is opened with again: how it was rounded, or its numbers, where rows decided."""
        lora: Any = self.config.model.chosen()["lora"]
        if lora.export != "adapter":
            return False
        if self.file is None:
            about = self.settings.model_dump(include={"format", "block"}) | {"dtype": self.dtype, "layers": self.layers}
        else:
            shutil.copyfile(self.file, folder / rounding.FILE)
            about = {rounding.FILE: sha256_file(self.file)}
        (folder / rounding.ABOUT).write_text(json.dumps(about))
        return False

    def remark(self, folder: Path) -> str:
        if not self.wrote(folder):
            return ""
        if self.file is None:
            return (
                f"The adapter was trained beside the base's linear layers in {self.settings.format}, to which fastft "
                f"rounds them again when it opens the adapter (`{rounding.ABOUT}`). Other tools may load the base so, "
                "too, or whole; or merge the two for them (`fastft export RUN FOLDER --merge`)."
            )
        return (
            f"The adapter was trained beside the base's linear layers as they are in `{rounding.FILE}`, in 4 bits, "
            "which fastft opens with it. Other tools know the base alone: merge it for them "
            "(`fastft export RUN FOLDER --merge`)."
        )

    @classmethod
    def wrote(cls, folder: Path) -> bool:
        files = (folder / rounding.FILE, folder / rounding.ABOUT)
        return any(file.is_file() for file in files) and rooms.EDITS.get("lora").wrote(folder)

    @classmethod
    def open(cls, folder: Path, model: torch.nn.Module) -> None:
        """Give the base the numbers that the adapter was trained beside, in the model's dtype."""
        bitsandbytes()
        about = rounding.about(folder)
        with torch.no_grad():
            if "format" in about:
                _round_again(model, about, folder / rounding.ABOUT)
                return
            for name, parts in rounding.read(folder / rounding.FILE):
                model.get_parameter(f"{name}.weight").copy_(rounding.numbers(parts))

    def plain(self, state: State, model: torch.nn.Module) -> State:
        makers = Lazy.taken(state, {name: name for name in state})
        for name, module in model.named_modules():
            if is_quantized(module):
                for key in [key for key in makers if key.startswith(f"{name}.") and key != f"{name}.bias"]:
                    del makers[key]
                makers[f"{name}.weight"] = functools.partial(dequantized, module)
        return Lazy(makers)

    def record(self) -> dict[str, Any]:
        asked = self.settings.model_dump(exclude={"format"}, exclude_defaults=True)
        return {"quantize": {"format": self.settings.format, "layers": len(self.layers), **asked}}


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value or '(default)'}" for name, value in values.items())


def bitsandbytes() -> Any:
    """The library. UserError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # every call of an int8 layer says that it casts
    try:
        import bitsandbytes
    except ImportError as e:
        said = f"A base in few bits (model.quantize) needs bitsandbytes: {e}"
        raise UserError(said, "pip install 'fastft[quantize]'") from None
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    return bitsandbytes


def put(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)


def quantized(
    layer: torch.nn.Linear, settings: QuantizeSettings, parts: rounding.Parts | None = None
) -> torch.nn.Module:
    """A linear layer's stand-in that holds its weight in few bits, and its bias as it is; on the CPU: the same bits
    whatever device is to train.

    ``parts``: the rounded weight, as bitsandbytes saves it; None: it is rounded here.
    """
    nn, weight = bitsandbytes().nn, layer.weight.detach().to("cpu").contiguous()
    sizes = {"input_features": layer.in_features, "output_features": layer.out_features}
    made: Any
    if settings.format == "nf4":
        how: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
        made = nn.Linear4bit(**sizes, bias=False, compute_dtype=weight.dtype, device="meta", **how)
        if parts is None:
            made.weight = nn.Params4bit(weight, requires_grad=False, blocksize=settings.block, module=made, **how).to(
                "cpu"
            )
        else:
            about = {name: tensor for name, tensor in parts.items() if name != "weight"}
            made.weight = nn.Params4bit.from_prequantized(parts["weight"], about, device="cpu", module=made)
        made.weight.module = made
        made.quant_state = made.weight.quant_state
        made.support_avx512bf16_for_cpu = False  # an evaluation would lay the weight out anew, for good
    else:
        made = nn.Linear8bitLt(**sizes, bias=False, has_fp16_weights=False, device="meta")
        made.weight = nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    made.bias = layer.bias
    made.train(layer.training)
    return made


def _round_again(model: torch.nn.Module, about: dict[str, Any], path: Path) -> None:
    """The base's layers as the run rounded them, layer by layer. ``about``: what ``path`` says."""
    try:
        settings = QuantizeSettings(format=about["format"], block=about["block"])
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[about["dtype"]]
        weights = [model.get_parameter(f"{name}.weight") for name in about["layers"]]
        shapes = [(outputs, inputs) for outputs, inputs in (weight.shape for weight in weights)]
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        said = str(e).splitlines()[0]
        hint = f"Export the adapter again. {rounding.NEEDED}"
        raise UserError(f"{path}: does not fit the base ({type(e).__name__}: {said}).", hint) from None
    for weight, (outputs, inputs) in zip(weights, shapes, strict=True):
        alone = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
        alone.weight = torch.nn.Parameter(weight.detach().to("cpu", dtype), requires_grad=False)
        weight.copy_(dequantized(quantized(alone, settings)))


def is_quantized(module: torch.nn.Module) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and type(module).__module__.startswith(
        "bitsandbytes."
    )


def dequantized(module: Any) -> torch.Tensor:
    """(out, in) float32 on the CPU: the numbers that the layer computes with."""
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        return bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state).float().cpu()
    codes = weight.data if weight.data.dtype == torch.int8 else weight.CB
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return (codes.float() * (scales.float() / 127)[:, None]).cpu()
