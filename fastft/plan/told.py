"""What `fastft plan CONFIG` says: memory by part, whether it fits, time and money, what would make it fit, and what a
run took."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastft import config as configuration
from fastft.errors import UserError
from fastft.plan import changes, report
from fastft.plan.changes import Offer
from fastft.plan.configured import Disk, Planned, measured, planned
from fastft.plan.fit import calibrated
from fastft.plan.model import HARDWARE, Hardware, Setup, step

WHAT = {
    "weights": "parameters of this rank",
    "gradients": "at that moment",
    "optimizer": "state, and masters of bf16 weights",
    "activations": "kept for the backward, and what a layer's backward takes",
    "logits": "a chunk, or all",
    "buckets": "DeepSpeed's, and weights gathered by ZeRO 3",
    "heap": "of a CPU run: freed, and of no size for anything else",
    "process": "everything else: an allowance on a GPU, measured on a CPU",
}


@dataclass(frozen=True)
class Options:
    """Of the command.

    Attributes
    ----------
    ranks : int or None
        None: this machine's GPUs, or 1; of a run's folder, as many as it had.
    hardware : str or None
        As `fastft.plan.report.hardware_of` takes it; None: this machine.
    memory : str or None
        Of a GPU, such as 80GB; None: the hardware's.
    price : float or None
        Of a GPU for an hour.
    tokens : float or None
        To train on; None: train.steps, where the configuration says them.
    """

    ranks: int | None = None
    hardware: str | None = None
    memory: str | None = None
    price: float | None = None
    tokens: float | None = None


def tell(target: str, overrides: Sequence[str], options: Options) -> dict[str, Any]:
    """A JSON-able report; bytes, seconds.

    Raises
    ------
    UserError
        Bad configuration, model or option.
    """
    config, is_run = configuration.load_either(target, overrides)
    taken = measured(config)
    gpus = 0 if config.run.device == "cpu" else torch.cuda.device_count()
    ranks = options.ranks or (taken["ranks"] if is_run and taken else gpus or 1)
    if ranks < 1:
        raise UserError(f"--gpus {ranks}: must be more than 0.")
    elsewhere = options.hardware or (options.memory and config.run.device != "cpu")
    device = "cuda" if gpus or elsewhere or config.run.device == "cuda" else "cpu"
    hardware = report.hardware_of(options.hardware) if options.hardware else None
    limit = _limit(device, options, hardware, ranks)

    def replan(more: Sequence[str], on: int) -> Planned:
        changed = configuration.load_either(target, [*overrides, *more])[0]
        return planned(changed, device, on)

    found = replan((), ranks)
    need = lambda p: p.plan.process + (p.plan.peak if device == "cpu" else p.plan.training)
    constants = calibrated().constants
    machine = hardware or HARDWARE["h100"]

    def seconds(p: Planned) -> float:
        if device == "cpu" and hardware is None:  # a CPU is as busy as its products are many
            return p.batching.size * (4 + 2 * p.trained + 2 * p.config.parallel.activation_checkpointing)
        return step(_setup(p, machine), constants).seconds

    offered = changes.offers(found, lambda p: need(p) <= limit, replan, seconds)
    plan = found.plan
    return {
        "config": target,
        "overrides": list(overrides),
        "model": {**dataclasses.asdict(found.shape), "trained": found.tensors.trained},
        "device": device,
        "ranks": ranks,
        "zero": plan.setting.zero,
        "batch": dataclasses.asdict(found.batching),
        "memory": {
            "parts": {**plan.parts, "process": plan.process},
            "fullest": plan.moment,
            "fullest_of_all": max(plan.moments, key=plan.moments.__getitem__),
            "moments": {name: sum(parts.values()) for name, parts in plan.step.items()},
            "around": {name: sum(parts.values()) for name, parts in plan.around.items()},
            "training": plan.training + plan.process,
            "need": need(found),
            "limit": limit,
            "fits": need(found) <= limit,
            "traced": plan.kept.traced,
        },
        "disk": dataclasses.asdict(found.disk),
        "time": _time(found, hardware, options) if hardware else None,
        "changes": [_offer(o, need(o.planned)) for o in offered],
        "measured": _beside(taken, found) if taken else None,
    }


def _limit(device: str, options: Options, hardware: Hardware | None, ranks: int) -> float:
    """Bytes that a rank may take."""
    if options.memory is not None:
        return size(options.memory)
    if hardware is not None:
        return hardware.memory
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "run.device: cuda, and no GPU is here.", "Say which is meant: --hardware h100, or --memory 80GB."
            )
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks  # all of them are on this machine


UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def size(text: str) -> float:
    """Bytes as people write them: 80GB, 40GiB, 8e10. UserError for another text."""
    lowered = text.strip().lower().replace(" ", "").removesuffix("b")
    binary = lowered.endswith("i")
    number, unit = lowered.removesuffix("i"), ""
    if number[-1:] in UNITS and number[-1:]:
        number, unit = number[:-1], number[-1:]
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise UserError(f"--memory {text}: is no size.", "For example: 80GB, 40GiB.")
    return value * (1024.0 ** "kmgt".index(unit) * 1024 if binary and unit else UNITS[unit])


def _setup(p: Planned, hardware: Hardware) -> Setup:
    return Setup(
        p.shape,
        hardware,
        p.setting.ranks,
        p.setting.zero,
        p.batching.rows / p.config.parallel.sequence,
        p.batching.width,
        p.batching.accumulation,
        p.config.parallel.activation_checkpointing,
        trained=p.trained,
        sequence=p.config.parallel.sequence,
        offload=p.setting.offload,
    )


def _time(p: Planned, hardware: Hardware, options: Options) -> dict[str, float | None]:
    """By the model of `fastft plan --params`: bf16 on H100-like GPUs."""
    found = step(_setup(p, hardware), calibrated().constants)
    tokens = p.batching.size * p.batching.width
    steps = options.tokens / tokens if options.tokens else p.config.train.steps
    hours = found.seconds * steps / 3600 if steps else None
    price = options.price if options.price is not None else hardware.price
    return {
        "step_seconds": found.seconds,
        "tokens_per_second": tokens / found.seconds,
        "mfu": found.mfu,
        "communication_share": found.communication_share,
        "steps": steps,
        "hours": hours,
        "gpu_hours": hours * p.setting.ranks if hours else None,
        "cost": hours * p.setting.ranks * price if hours and price is not None else None,
    }


def _offer(o: Offer, need: int) -> dict[str, Any]:
    return {
        "overrides": list(o.change.overrides),
        "ranks": o.change.ranks,
        "need": need,
        "time": o.time,
        "work": o.work,
        "words": o.change.words,
    }


def _beside(taken: dict, found: Planned) -> dict[str, Any]:
    """What a run took, and the plan's error where the two are of the same run."""
    comparable = taken["same"] and taken["ranks"] == found.setting.ranks and taken["device"] == found.setting.device
    planned_bytes = found.plan.training + (found.plan.process if found.setting.device == "cpu" else 0)
    return {**taken, "error": planned_bytes / taken["memory"] - 1 if comparable else None}


def lines(result: dict[str, Any]) -> list[str]:
    """What stands below the table, a sentence each."""
    memory, model = result["memory"], result["model"]
    gb = lambda n: f"{n / 1e9:.2f} GB"
    rank = "GPU" if result["device"] == "cuda" else "rank"
    used = "" if model["active"] is None else f" stored, {model['active']:,} active for a token"
    batch = result["batch"]
    told = [
        f"{model['parameters']:,} parameters{used}, {model['trained']:,} trained; {result['ranks']:,} "
        f"{rank}{'s' * (result['ranks'] > 1)}, ZeRO {result['zero']}; {batch['rows']} x {batch['width']:,} tokens at "
        f"once, {batch['accumulation']} time{'s' * (batch['accumulation'] > 1)} a step.",
        "moments of a step: " + ", ".join(f"{name} {gb(n)}" for name, n in memory["moments"].items()) + ".",
        "before and after: " + ", ".join(f"{name} {gb(n)}" for name, n in memory["around"].items()) + _where(result),
        Disk(**result["disk"]).sentence,
        f"{'fits' if memory['fits'] else 'does not fit'}: {gb(memory['need'])} ({memory['fullest_of_all']}) of "
        f"{gb(memory['limit'])} a {rank}.",
    ]
    if not memory["traced"]:
        told.append("activations are an estimate by layers and hidden size: the model cannot be run without values.")
    if time := result["time"]:
        told.append(_timed(time))
    if taken := result["measured"]:
        error = taken["error"]
        beside = "another configuration" if error is None else f"the plan is {error:+.1%}"
        told.append(f"measured in {taken['dir']}: {gb(taken['memory'])} on rank 0 until its last step ({beside}).")
    return told


def _where(result: dict[str, Any]) -> str:
    return "." if result["device"] == "cpu" else " (checkpoint and export in the host's memory, of rank 0)."


def _timed(time: dict[str, Any]) -> str:
    text = f"a step {report.duration(time['step_seconds'])}, {time['tokens_per_second']:,.0f} tokens/s"
    if time["hours"]:
        text += (
            f"; {time['steps']:,.0f} steps {report.duration(time['hours'] * 3600)}, {time['gpu_hours']:,.0f} GPU-hours"
        )
    if time["cost"] is not None:
        text += f", {time['cost']:,.0f} at the price given"
    return text + " (bf16; constants of published H100 runs)."


def price(change: dict[str, Any], ranks: int) -> str:
    """What a change costs, in words."""
    text = f"{change['time']:.2f} x the time"
    if change["ranks"] != ranks:
        text += f", {change['work']:.2f} x the GPU-hours"
    return text if change["words"].endswith("GPUs") else f"{text}; {change['words']}"


def change(offered: dict[str, Any]) -> str:
    """A change as the command line takes it."""
    return " ".join(offered["overrides"]) or "more GPUs"
