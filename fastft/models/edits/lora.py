"""LoRA and DoRA through peft, put into the model in place."""

from __future__ import annotations

import copy
import fnmatch
import functools
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
from fastft.models.edits.base import LINEAR, Edit, Lazy, State, inner_linears

log = logging.getLogger(__name__)

NAME = "default"  # of the one adapter, as peft calls it
PREFIX = "base_model.model."  # before every name in peft's files
CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
# peft's names for what a model does, by the end of its class's name.
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "MTModel": "SEQ_2_SEQ_LM",
}
# What a resume may not change: the weights in a checkpoint mean something else with another of these.
FIXED = ("r", "alpha", "targets", "dora", "rslora", "train")
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

    def check(self, config: Config) -> None:
        if config.model.resize_embeddings:
            raise ValueError(
                "model.resize_embeddings: an adapter holds no rows of the embedding, so the new ones would be lost: "
                "save a model with the larger embedding first (resize_token_embeddings) and start from that folder"
            )


@rooms.EDITS.register("lora")
class LoRA(Edit):
    """Low-rank adapters beside frozen weights; the head of a task that has one is trained in full."""

    Settings = LoRASettings
    order = 100

    def __init__(self, settings: LoRASettings, config: Config):
        super().__init__(settings, config)
        self.hashes: dict[str, str] | None = None
        self.commit: str | None = None  # of a base from the hub
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
        if settings.export == "adapter" and self.config.model.init == "random":
            raise UserError(
                "model.init: random: an adapter beside weights that are nowhere is of no use.",
                "Set model.lora.export: merged, or start from pretrained weights.",
            )
        self.commit = getattr(model.config, "_commit_hash", None)
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
        if settings.export == "adapter" and (odd := _not_in_whole_modules(model, self.whole)):
            raise UserError(
                f"model.lora: {odd[0]} is tied to another weight, or only a part of a module that is trained in full: "
                "peft's files cannot say that.",
                "Set model.lora.export: merged.",
            )
        dtype = next(model.parameters()).dtype
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        inject(model, self._peft_config(model, self.config.model.path))
        self.whole = [name for name in self.whole if name in trainable]
        for name, parameter in model.named_parameters():
            own = _is_own(name)  # what model.freeze names stays frozen
            parameter.requires_grad_(own or name in self.whole)
            if own:  # one dtype for all: DeepSpeed keeps fp32 masters of the trained ones
                parameter.data = parameter.data.to(dtype)

    def _peft_config(self, model: Any, base: str) -> Any:
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
            revision=self.config.model.revision or self.commit,
            task_type=next((t for end, t in TASK_TYPES.items() if type(model).__name__.endswith(end)), None),
        )

    # -- the base ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        if self.hashes is None:
            self.hashes = base_hashes(self.config.model.path)
        fixed = self.settings.model_dump(include=set(FIXED))
        return {"base": self.config.model.path, "commit": self.commit, "sha256": self.hashes, "settings": fixed}

    def check_state(self, state: dict[str, Any]) -> str:
        now = self.state()
        for name, then in state["settings"].items():
            if then != now["settings"][name]:
                return f"model.lora.{name} was {then}, and is {now['settings'][name]}."
        if self.config.model.init == "pretrained" and any(state[k] != now[k] for k in ("sha256", "commit")):
            return f"model.path: {self.config.model.path} holds other weights than the adapter was trained on."
        return ""

    # -- export --------------------------------------------------------------------------------------------------------

    def write(self, state: State, model: Any, folder: Path, dtype: torch.dtype) -> bool:
        from safetensors.torch import save_file

        if self.settings.export == "merged":
            return False
        _report_unmoved(state)
        own = [name for name in state if _is_own(name) or name in self.whole]
        tensors = {PREFIX + _file_name(name): state[name].detach().to("cpu", dtype).contiguous() for name in own}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        path = Path(self.config.model.path).expanduser()
        config = self._peft_config(model, str(path.absolute()) if path.is_dir() else self.config.model.path)
        config.inference_mode = True
        config.save_pretrained(folder)
        (folder / BASE).write_text(json.dumps(self.state(), indent=1))
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)  # the labels of a new head are in it
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        return True

    def merged(self, state: State, model: torch.nn.Module, dtype: torch.dtype) -> State:
        _report_unmoved(state)
        makers = Lazy.taken(state, {name.replace(".base_layer.", "."): name for name in state if not _is_own(name)})
        adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        errors: dict[str, float] = {}

        def merge(name: str) -> torch.Tensor:
            module: Any = adapted[name]
            transposed = type(module.get_base_layer()).__name__ == "Conv1D"
            own = {k.removeprefix(f"{name}."): state[k].float().cpu() for k in state if k.startswith(f"{name}.")}
            made, error = _merge(name, module, own, module.scaling[NAME], transposed, dtype)
            if name not in errors:
                errors[name] = error
                if len(errors) == len(adapted):
                    said = "LoRA merged: rounding moves a layer's output by up to %.1e of its largest"
                    log.warning(said, max(errors.values()))
            return made

        for name in adapted:
            makers[f"{name}.weight"] = functools.partial(merge, name)
        plain = Lazy(makers)
        _untie_if_different(plain, model)
        return plain

    @classmethod
    def wrote(cls, folder: Path) -> bool:
        return (folder / CONFIG).is_file()

    @classmethod
    def base(cls, folder: Path) -> tuple[str, str | None]:
        config = json.loads((folder / CONFIG).read_text())
        path, revision = config["base_model_name_or_path"], config.get("revision")
        local = Path(path).expanduser()
        if local.is_absolute() and not local.is_dir():
            raise UserError(
                f"{folder}: its base, {path}, is not there.",
                f"Put it back, or write where it is now into {CONFIG} (base_model_name_or_path).",
            )
        if (folder / BASE).is_file():
            then = json.loads((folder / BASE).read_text())["sha256"]
            if then and base_hashes(path) != then:
                raise UserError(
                    f"{folder}: its base, {path}, holds other weights than the adapter was trained on.",
                    "Put the old base back, or train the adapter on the new one.",
                )
        return path, revision

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
    try:
        inject_adapter_in_model(config, model, adapter_name=NAME)
    except ValueError as e:  # layers that peft knows not to be linear ones alone (Mamba's)
        raise UserError(f"model.lora: peft refuses {type(model).__name__}: {e}", "Set model.lora.targets.") from None
    config.modules_to_save = saved


def base_hashes(path: str) -> dict[str, str]:
    """SHA-256 of a local model's weight files, by name; {} for a hub id, whose revision says what it is."""
    folder = Path(path).expanduser()
    files = sorted(p for p in folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {Path(name).name: entry["sha256"] for name, entry in fingerprint(files, {}).items()}


def _targets(model: Any, wanted: str | list[str], heads: tuple[str, ...]) -> list[str]:
    """Whole names of the modules that get an adapter. Raises UserError for what has none, or is a head."""
    if wanted == "all-linear":
        return inner_linears(model, heads)
    linear = [name for name, m in model.named_modules() if type(m).__name__ in LINEAR]
    inner = [name for name in linear if not set(name.split(".")) & set(heads)]
    found: list[str] = []
    patterns = [wanted] if isinstance(wanted, str) else wanted
    for pattern in patterns:
        hits = [n for n in linear if n == pattern or n.endswith(f".{pattern}") or fnmatch.fnmatch(n, pattern)]
        if not hits:
            leaves = sorted({n.rpartition(".")[2] for n in inner})
            raise UserError(f"model.lora.targets: {pattern!r} matches no linear layer.", did_you_mean(pattern, leaves))
        if head := [name for name in hits if name not in inner]:
            raise UserError(
                f"model.lora.targets: {head[0]} is a part of the task's head, which is trained in full.",
                "Leave it out.",
            )
        found += [name for name in hits if name not in found]
    if not found:
        raise UserError("model.lora.targets: no module is named.", "For example: targets: all-linear")
    return found


def _inside(name: str, modules: list[str]) -> bool:
    return _module(name) in modules


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _not_in_whole_modules(model: torch.nn.Module, whole: list[str]) -> list[str]:
    """Parameters trained in full that peft's files cannot hold: those know modules, with all of their parameters."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    tied = {name for names in by_tensor.values() if len(names) > 1 for name in names}
    modules = {_module(name): model.get_submodule(_module(name)) for name in whole}
    inside = {f"{m}.{n}" for m, module in modules.items() for n, _ in module.named_parameters(remove_duplicate=False)}
    return sorted(name for name in inside | set(whole) if name in tied or name not in whole)


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


def _untie_if_different(state: State, model: Any) -> None:
    """An adapter of a tied output layer makes two weights of one: the config must not say that they are one."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    from fastft.models.head import input_embedding

    places: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
    ends = [part.weight for part in (input_embedding(model), model.get_output_embeddings()) if part is not None]
    names = [places.get(id(weight), "").replace(".base_layer.", ".") for weight in ends]
    found = [state[name] for name in names if name in state]
    head = [name for name in state if name.endswith("lm_head.weight")]
    if found and head and not torch.equal(found[0].to((last := state[head[0]]).dtype), last):
        model.config.tie_word_embeddings = False


def _merge(
    name: str, module: Any, own: State, scale: float, transposed: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    """The base's weight with its adapter, summed in float32 and rounded once; its error beside peft's own forward.

    ``own``: the module's weights, by their names in it.
    """
    base, a, b = own["base_layer.weight"], own[f"lora_A.{NAME}.weight"], own[f"lora_B.{NAME}.weight"]
    merged = (base.T if transposed else base) + scale * (b @ a)  # (out, in)
    magnitude = own.get(f"lora_magnitude_vector.{NAME}.weight")
    if magnitude is not None:
        merged = (magnitude.flatten() / torch.linalg.norm(merged, dim=1))[:, None] * merged
    rounded = merged.to(dtype)
    x = torch.randn(8, merged.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = _peft_forward(module, own, scale, x, transposed)
    got = x @ rounded.float().T + own.get("base_layer.bias", torch.zeros(1))
    error = ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    if not error <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        raise UserError(f"{name}: the merged weight is off by {error:.2g} of its output.", "Export the adapter.")
    return (rounded.T if transposed else rounded).contiguous(), error


def _peft_forward(module: Any, own: State, scale: float, x: torch.Tensor, transposed: bool) -> torch.Tensor:
    """What peft's layer puts out with these weights, in float32; where its own are in shards (ZeRO-3) or in few bits,
    its formula.
    """
    if any(hasattr(p, "ds_id") or not p.is_floating_point() for p in module.parameters()):
        base = own["base_layer.weight"]
        low = x @ own[f"lora_A.{NAME}.weight"].T
        plain = x @ (base if transposed else base.T) + own.get("base_layer.bias", torch.zeros(1))
        return plain + scale * (low @ own[f"lora_B.{NAME}.weight"].T)
    probe = copy.deepcopy(module)
    for key, parameter in probe.named_parameters():
        parameter.data = own[key].clone()
    return probe.float().cpu().eval()(x)
