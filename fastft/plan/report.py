"""What `fastft plan` says: each candidate ZeRO stage for a model on a number of GPUs."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.config import Model
from fastft.config.reading import read
from fastft.errors import UserError, did_you_mean
from fastft.plan.experts import active
from fastft.plan.failures import reliability
from fastft.plan.fit import calibrated
from fastft.plan.model import HARDWARE, Hardware, Setup, Shape, memory, step

COLUMNS = (
    "ZeRO",
    "GB per GPU",
    "states",
    "activations",
    "fits",
    "step",
    "tokens/s",
    "per GPU",
    "MFU",
    "communication",
    "save every",
    "goodput",
    "days",
)


@dataclass(frozen=True)
class Request:
    """The options of `fastft plan`; each field is the option of that name, checked here."""

    gpus: int
    zero: tuple[int, ...] = (0, 1, 2, 3)
    hardware: str = "h100"
    micro_batch: int = 1
    sequence_length: int = 2048
    accumulation: int = 1
    recompute: bool = False
    tokens: float | None = None
    save_seconds: float = 60.0
    restart_seconds: float = 600.0
    stall: float = 0.0
    efficiency: float | None = None
    gpus_per_node: int | None = None
    node_gbits: float | None = None

    def __post_init__(self):
        for name in (
            "gpus",
            "micro_batch",
            "sequence_length",
            "accumulation",
            "gpus_per_node",
            "node_gbits",
            "tokens",
            "save_seconds",
        ):
            _check(name, getattr(self, name), lambda v: v > 0, "must be more than 0")
        for name in ("restart_seconds", "stall"):
            _check(name, getattr(self, name), lambda v: v >= 0, "must not be negative")
        _check("efficiency", self.efficiency, lambda v: 0 < v <= 1, "is a share of the peak, in (0, 1]")
        for stage in self.zero:
            _check("zero", stage, lambda v: v in (0, 1, 2, 3), "must be 0, 1, 2 or 3")
        hardware_of(self.hardware)

    def machine(self) -> Hardware:
        """The hardware, with what the options say of its nodes."""
        known = hardware_of(self.hardware)
        changes: dict[str, Any] = {
            "gpus_per_node": self.gpus_per_node,
            "inter_node_bandwidth": self.node_gbits and self.node_gbits * 1e9 / 8,
        }
        return dataclasses.replace(known, **{name: value for name, value in changes.items() if value is not None})


def hardware_of(name: str) -> Hardware:
    """A known kind of GPU, or that of a YAML file with ``Hardware``'s fields. Raises UserError."""
    if name in HARDWARE:
        return HARDWARE[name]
    if not Path(name).is_file():
        hint = (
            "Or a YAML file: flops, hbm_bandwidth, memory, intra_node_bandwidth, inter_node_bandwidth, gpus_per_node, "
            "price, host_link, host_bandwidth."
        )
        raise UserError(f"--hardware {name}: unknown.", f"{did_you_mean(name, HARDWARE)} {hint}")
    values, fields = read(name), {field.name: field for field in dataclasses.fields(Hardware)}
    needed = {field for field, f in fields.items() if f.default is dataclasses.MISSING}
    for wrong, what in ((values.keys() - fields.keys(), "knows no"), (needed - values.keys(), "lacks")):
        if wrong:
            raise UserError(f"--hardware {name}: {what} {min(wrong)}.", f"Its keys: {', '.join(fields)}.")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or not math.isfinite(value):
            raise UserError(f"--hardware {name}: {key}: {value!r} is no positive number.")
    numbers: dict[str, Any] = {k: int(v) if k == "gpus_per_node" else float(v) for k, v in values.items()}
    return Hardware(**numbers)


def _check(name: str, value: float | None, good, rule: str) -> None:
    if value is not None and not (math.isfinite(value) and good(value)):
        raise UserError(f"--{name.replace('_', '-')} {value}: {rule}.")


UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def count(text: str) -> float:
    """A number of parameters as people write it: 7B, 350M, 7e9. UserError for another text."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([kmbt]?)\s*", text.lower().replace("_", ""))
    if found is None:
        raise UserError(f"--params {text}: is no number of parameters.", "For example: 7B, 350M, 7e9.")
    return float(found[1]) * UNITS[found[2]]


def shape(model: str | None, params: float | None) -> Shape:
    """Of a model folder or hub id (its config.json, on the meta device: no weights are read),
    or of a number of parameters.
    """
    if (model is None) == (params is None):
        raise UserError(
            "Give either a model (folder or hub id) or --params.", "For example: fastft plan --params 7B --gpus 8"
        )
    if params is not None:
        _check("params", params, lambda v: v >= 1e6, "must be at least 1e6")
        return Shape.of_size(int(params))
    assert model is not None  # or params would be
    return _shape_of_config(model)


def _shape_of_config(path: str) -> Shape:
    import torch  # seconds, which --params does without
    import transformers

    from fastft.models import load

    config = load.config(Model(path=path))
    saved = getattr(transformers, (config.architectures or [""])[0], None)  # the class that wrote the folder
    with torch.device("meta"):
        if isinstance(saved, type) and issubclass(saved, transformers.PreTrainedModel):
            model = saved(config)
        elif type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            raise UserError(
                f"model path {path}: its config.json names no architecture that transformers knows.",
                "Give --params instead.",
            )
    text = config.get_text_config()
    layers, hidden = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not layers or not hidden:
        raise UserError(
            f"model path {path}: its config.json has no num_hidden_layers or hidden_size.", "Give --params instead."
        )
    return Shape(sum(p.numel() for p in model.parameters()), layers, hidden, active(model))


def plan(model: Shape, request: Request) -> dict:
    """A JSON-able report: the model, the constants, and a row per
    ZeRO stage (seconds, bytes, tokens per second of all GPUs).
    """
    constants = calibrated().constants
    if request.efficiency is not None:
        constants = dataclasses.replace(constants, kernel_efficiency=request.efficiency)
    hardware = request.machine()
    failures = reliability(request.gpus, request.save_seconds, request.restart_seconds)
    rows = []
    for stage in sorted(set(request.zero)):
        setup = Setup(
            model,
            hardware,
            request.gpus,
            stage,
            request.micro_batch,
            request.sequence_length,
            request.accumulation,
            request.recompute,
            stall=request.stall,
        )
        predicted, held = step(setup, constants), memory(setup)
        rate = predicted.tokens_per_second * request.gpus
        kept = rate * failures.goodput
        rows.append(
            {
                "zero": stage,
                "memory": held.total,
                "states": held.states,
                "activations": held.activations,
                "fits": held.total <= hardware.memory,
                "step_seconds": predicted.seconds,
                "tokens_per_second": rate,
                "mfu": predicted.mfu,
                "communication_seconds": predicted.communication,
                "communication_share": predicted.communication_share,
                "save_interval": failures.save_interval,
                "goodput": failures.goodput,
                "days": request.tokens / kept / 86400 if request.tokens and kept else None,
            }
        )
    return {
        "model": dataclasses.asdict(model),
        "gpus": request.gpus,
        "hardware": dataclasses.asdict(hardware),
        "constants": dataclasses.asdict(constants),
        "mtbf": failures.mtbf,
        "stages": rows,
    }


def cells(row: dict, gpus: int) -> list[str]:
    """A row of the report as `COLUMNS` show it."""
    gigabytes = [f"{row[name] / 1e9:.1f}" for name in ("memory", "states", "activations")]
    return [
        str(row["zero"]),
        *gigabytes,
        "yes" if row["fits"] else "no",
        duration(row["step_seconds"]),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tokens_per_second'] / gpus:,.0f}",
        f"{row['mfu']:.1%}",
        f"{row['communication_share']:.1%}",
        duration(row["save_interval"]),
        f"{row['goodput']:.1%}",
        "-" if row["days"] is None else f"{row['days']:,.1f}",
    ]


def duration(seconds: float) -> str:
    """The three leading digits, in the unit that a person would take."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def is_configuration(target: str) -> bool:
    """Whether it is a configuration's file or a run's folder, rather than a model."""
    path = Path(target)
    return path.is_file() or path.suffix in (".yaml", ".yml") or (path / "config.yaml").is_file()


def only_of_configurations(given: dict[str, Any]) -> None:
    """UserError for what a model alone has no use for."""
    for name, value in given.items():
        if value:
            raise UserError(f"{name}: is for a configuration.", "For example: fastft plan config.yaml --memory 80GB")
