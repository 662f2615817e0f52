"""LoRA and DoRA through peft, put into the model in place."""

from __future__ import annotations

import fnmatch
import json
import logging
from pathlib import Path
from typing import Any

from pydantic import Field

from fastft import rooms
from fastft.config import Config, Section
from fastft.data.sources import fingerprint
from fastft.errors import UserError, did_you_mean
from fastft.lazy import torch
from fastft.models.edits.base import Edit, State

log = logging.getLogger(__name__)

NAME = "default"  # of the one adapter, as peft calls it
PREFIX = "base_model.model."  # before every name in peft's files
CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
# Largest error of a merged layer over its largest output: rounding of the sum, once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class LoRASettings(Section):
    """Hu et al. 2021, arXiv 2106.09685; DoRA: Liu et al. 2024, arXiv 2402.09353."""

    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float | None = Field(None, gt=0, description="The update is scaled by alpha / r; default: 2 r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the adapter's input, in training.")
    targets: str | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: all-linear (all but the head), or names such as q_proj, or patterns "
        "(fnmatch) of whole names such as model.layers.0.*.",
    )
    dora: bool = Field(False, description="Weight-decomposed: magnitude and direction are learned apart.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (Kalajdzievski 2023).")
    train: list[str] = Field(
        [], description="Patterns (fnmatch) of the base's parameters that are trained in full beside the adapter."
    )
    export: str = Field(
        "adapter",
        pattern="^(adapter|merged)$",
        description="What <run.dir>/model holds: the adapter (peft's files), or the whole model with it merged in.",
    )


@rooms.EDITS.register("lora")
class LoRA(Edit):
    """Low-rank adapters beside frozen weights; the head of a task that has one is trained in full."""

    Settings = LoRASettings
    order = 100

    def __init__(self, settings: LoRASettings, config: Config):
        super().__init__(settings, config)
        self.hashes: dict[str, str] | None = None
        self.adapted: list[str] = []
        self.whole: list[str] = []

    @property
    def freezes_base(self) -> bool:
        return True

    def apply(self, model: torch.nn.Module, heads: tuple[str, ...]) -> None:
        settings = self.settings
        if settings.dora and self.config.parallel.zero == 3:
            raise UserError(
                "model.lora.dora: DoRA needs the norms of whole weights in every forward; ZeRO-3 holds them in shards.",
                "Set parallel.zero to 0, 1 or 2, or dora: false.",
            )
        self.adapted = _targets(model, settings.targets, heads)
        # By names alone: a parameter of the base keeps its requires_grad only if it is one of these.
        names = [name for name, _ in model.named_parameters()]
        self.whole = [n for n in names if set(n.split(".")) & set(heads) and not _inside(n, self.adapted)]
        for pattern in settings.train:
            if not (hits := fnmatch.filter(names, pattern)):
                hint = f"Names look like: {', '.join(names[:3])}, ..., {names[-1]}."
                raise UserError(f"model.lora.train: {pattern!r} matches no parameter.", hint)
            self.whole += [name for name in hits if name not in self.whole]
        if strange := [n for n in self.whole if _inside(n, self.adapted)]:
            raise UserError(
                f"model.lora.train: {strange[0]} has an adapter already.", "Leave it out of one of the two."
            )
        if settings.export == "adapter" and (tied := sorted(_tied(model) & set(self.whole))):
            raise UserError(
                f"model.lora.train: {tied[0]} is tied to another weight, which peft's files cannot say.",
                "Set model.lora.export: merged.",
            )
        dtype = next(model.parameters()).dtype
        inject(model, self._peft_config(base=self.config.model.path))
        for name, parameter in model.named_parameters():
            own = any(part in PARTS for part in name.split("."))
            parameter.requires_grad_(own or name in self.whole)
            if own:  # one dtype for all: DeepSpeed keeps fp32 masters of the trained ones
                parameter.data = parameter.data.to(dtype)

    def _peft_config(self, base: str) -> Any:
        from peft import LoraConfig

        s = self.settings
        modules = sorted({_module(name) for name in self.whole})
        return LoraConfig(
            r=s.r,
            lora_alpha=2 * s.r if s.alpha is None else s.alpha,
            lora_dropout=s.dropout,
            target_modules=self.adapted,
            use_dora=s.dora,
            use_rslora=s.rslora,
            modules_to_save=modules or None,
            base_model_name_or_path=base,
            revision=self.config.model.revision,
        )

    # -- the base ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        if self.hashes is None:
            self.hashes = base_hashes(self.config.model.path)
        return {"base": self.config.model.path, "sha256": self.hashes}

    def check_state(self, state: dict[str, Any]) -> str:
        if self.config.model.init == "pretrained" and state["sha256"] != self.state()["sha256"]:
            return f"model.path: {self.config.model.path} holds other weights than the adapter was trained on."
        return ""

    # -- export --------------------------------------------------------------------------------------------------------

    def write(self, state: State, model: Any, folder: Path, dtype: torch.dtype) -> bool:
        from safetensors.torch import save_file

        if self.settings.export == "merged":
            return False
        _report_unmoved(state)
        own = {name: t for name, t in state.items() if _is_own(name) or name in self.whole}
        tensors = {PREFIX + _file_name(name): t.detach().to("cpu", dtype).contiguous() for name, t in own.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        path = Path(self.config.model.path)
        config = self._peft_config(str(path.absolute()) if path.is_dir() else str(path))
        config.inference_mode = True
        config.save_pretrained(folder)
        (folder / BASE).write_text(json.dumps(self.state(), indent=1))
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)  # the labels of a new head are in it
        return True

    def merged(self, state: State, model: torch.nn.Module, dtype: torch.dtype) -> State:
        _report_unmoved(state)
        errors = []
        out = {name: tensor for name, tensor in state.items() if not _is_own(name)}
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            base, scale = f"{name}.base_layer.weight", module.scaling[NAME]
            transposed = type(module.get_base_layer()).__name__ == "Conv1D"
            out[base], error = _merge(name, state, scale, transposed, dtype)
            errors.append(error)
        log.warning("LoRA merged: rounding moves a layer's output by up to %.1e of its largest", max(errors))
        return {name.replace(".base_layer.", "."): tensor for name, tensor in out.items()}

    @classmethod
    def wrote(cls, folder: Path) -> bool:
        return (folder / CONFIG).is_file()

    @classmethod
    def base(cls, folder: Path) -> str:
        path = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        if (folder / BASE).is_file():
            then = json.loads((folder / BASE).read_text())["sha256"]
            if then and base_hashes(path) != then:
                raise UserError(
                    f"{folder}: its base, {path}, holds other weights than the adapter was trained on.",
                    "Put the old base back, or train the adapter on the new one.",
                )
        return path

    @classmethod
    def open(cls, folder: Path, model: torch.nn.Module) -> None:
        from peft import LoraConfig
        from safetensors.torch import load_file

        config = LoraConfig.from_pretrained(str(folder))
        config.modules_to_save = None  # they are the model's own here
        inject(model, config)
        own = dict(model.named_parameters())
        loaded = {_model_name(name.removeprefix(PREFIX), own): t for name, t in load_file(folder / WEIGHTS).items()}
        strange = sorted(set(loaded) - set(own))
        missing = sorted(name for name in own if _is_own(name) and name not in loaded)
        if strange or missing:
            raise UserError(
                f"{folder}: the adapter does not fit its base: {', '.join((strange + missing)[:3])}.",
                "Was the base or the adapter changed?",
            )
        with torch.no_grad():
            for name, tensor in loaded.items():
                own[name].copy_(tensor)

    def record(self) -> dict[str, Any]:
        return {"lora": {"modules": len(self.adapted), "trained_in_full": self.whole}}


def inject(model: torch.nn.Module, config: Any) -> None:
    """Put adapters into the model's own modules; no wrapper stays around it."""
    from peft import inject_adapter_in_model

    # Heads are trained in place: peft would put copies of them beside the originals.
    saved, config.modules_to_save = config.modules_to_save, None
    inject_adapter_in_model(config, model, adapter_name=NAME)
    config.modules_to_save = saved


def base_hashes(path: str) -> dict[str, str]:
    """SHA-256 of a local model's weight files, by name; {} for a hub id, whose revision says what it is."""
    folder = Path(path)
    files = sorted(p for p in folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {Path(name).name: entry["sha256"] for name, entry in fingerprint(files, {}).items()}


def _targets(model: Any, wanted: str | list[str], heads: tuple[str, ...]) -> list[str]:
    """Whole names of the modules that get an adapter."""
    linear = [name for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "Embedding")]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    last = {name for name, m in model.named_modules() if output is not None and m is output}
    if wanted == "all-linear":
        kinds = ("Linear", "Conv1D")
        return [
            name
            for name, m in model.named_modules()
            if type(m).__name__ in kinds and name not in last and not set(name.split(".")) & set(heads)
        ]
    found: list[str] = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        hits = [n for n in linear if n == pattern or n.endswith(f".{pattern}") or fnmatch.fnmatch(n, pattern)]
        if not hits:
            leaves = sorted({n.rpartition(".")[2] for n in linear})
            raise UserError(f"model.lora.targets: {pattern!r} matches no linear layer.", did_you_mean(pattern, leaves))
        found += [name for name in hits if name not in found]
    return found


def _inside(name: str, modules: list[str]) -> bool:
    return _module(name) in modules


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _tied(model: torch.nn.Module) -> set[str]:
    """Names of parameters that are one tensor with another."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return {name for names in by_tensor.values() if len(names) > 1 for name in names}


def _is_own(name: str) -> bool:
    return any(part in PARTS for part in name.split("."))


def _file_name(name: str) -> str:
    """A parameter's name in peft's files, which leave the adapter's out."""
    return name.replace(f".{NAME}.weight", ".weight") if _is_own(name) else name.replace(".base_layer.", ".")


def _model_name(name: str, own: dict[str, Any]) -> str:
    """The other way round. Names of DoRA's magnitudes end without .weight in some versions."""
    if not _is_own(name):
        return name
    stem, _, last = name.rpartition(".")
    return f"{stem}.{NAME}.weight" if last == "weight" else f"{name}.{NAME}.weight"


def _report_unmoved(state: State) -> None:
    """lora_B begins as zeros: one that still is has learned nothing."""
    every = [name for name in state if "lora_B" in name.split(".")]
    unmoved = [name for name in every if not state[name].any()]
    if unmoved:
        few = ", ".join(name.replace(f".lora_B.{NAME}.weight", "") for name in unmoved[:3])
        log.warning("LoRA: %d of %d adapters did not move (%s)", len(unmoved), len(every), few)


def _merge(name: str, state: State, scale: float, transposed: bool, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """The base's weight with its adapter, summed in float32 and rounded once, and its error on random input."""
    base = state[f"{name}.base_layer.weight"].float().cpu()
    a, b = (state[f"{name}.{part}.{NAME}.weight"].float().cpu() for part in ("lora_A", "lora_B"))
    whole = base.T if transposed else base  # (out, in)
    update = scale * (b @ a)
    merged = whole + update
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, whole.shape[1], generator=generator)
    expected = x @ whole.T + scale * ((x @ a.T) @ b.T)
    magnitude = state.get(f"{name}.lora_magnitude_vector.{NAME}.weight")
    if magnitude is not None:
        factor = magnitude.float().cpu().flatten() / torch.linalg.norm(merged, dim=1)
        merged, expected = factor[:, None] * merged, expected * factor
    rounded = merged.to(dtype)
    error = ((x @ rounded.float().T - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    if not error <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        raise UserError(
            f"{name}: the merged weight differs from base and adapter by {error:.2g}.", "Export the adapter."
        )
    return (rounded.T if transposed else rounded).contiguous(), error
