"""What to change first, going by where a step's time goes."""

from __future__ import annotations

from typing import Any

from fastft.config import Config
from fastft.ops.cpu import cpu_multiplies_bf16

# Shares of a step, or of the tokens computed, from which on something is worth saying first.
WAITING = 0.05
PADDING = 0.2
COMMUNICATION = 0.2
HOST = 0.9
OPTIMIZER = 0.2
OTHER = 0.1


def advice(report: dict[str, Any], config: Config, step_seconds: float) -> str:
    """One sentence on the largest loss that a setting can change."""
    shares = {name: part["share"] for name, part in report["parts"].items()}
    micro = "batch.micro_tokens" if config.batch.micro == "auto" else "batch.micro"
    if shares["data"] > WAITING:
        return (
            f"{shares['data']:.0%} of a step waits for batches: the collation is slower than the model; give the ranks "
            "fewer run.threads, or longer steps."
        )
    if report["padding"] > PADDING:
        return (
            f"{report['padding']:.0%} of the tokens computed are padding: batch.micro: auto and data.order: "
            "length_groups put rows of like length together."
        )
    if shares["communication"] > COMMUNICATION:
        stage = " A lower parallel.zero sends less, where memory allows it." if config.parallel.zero == 3 else ""
        return f"{shares['communication']:.0%} of a step waits for other ranks: a larger batch sends less often.{stage}"
    if report["machine"]["device"].startswith("CPU"):
        if config.model.dtype == "fp32" and cpu_multiplies_bf16():
            return "This CPU multiplies bf16 in hardware: model.dtype: bf16 takes less time and memory."
    elif report["host_seconds"] > HOST * step_seconds:
        return (
            f"Python's launches take {report['host_seconds'] / step_seconds:.0%} of a step: the GPU waits for them; "
            f"raise {micro}."
        )
    if shares["optimizer"] > OPTIMIZER:
        return f"{shares['optimizer']:.0%} of a step is the update of the weights: a larger batch updates less often."
    if shares["other"] > OTHER:
        return f"{shares['other']:.0%} of a step is neither model nor update: raise train.log_every."
    used = report["flops"]["utilization"]
    return f"The model takes the time, at {used:.0%} of the best rate of matrix products here. No setting stands out."
