"""Failures: how often a run of many GPUs stops, how often to save, what remains of the time."""

import math
from dataclasses import dataclass

# Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384
# H100.
GPU_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419


@dataclass(frozen=True)
class Reliability:
    """Of a run; seconds.

    Attributes
    ----------
    mtbf : float
        Mean time between failures of the whole run.
    save_interval : float
        Time between checkpoints that loses least: sqrt(2 * save * mtbf) (Young 1974).
    goodput : float
        Share of wall time that goes into steps that are kept.
    """

    mtbf: float
    save_interval: float
    goodput: float


def reliability(
    world_size: int, save_seconds: float, restart_seconds: float, gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE
) -> Reliability:
    """To first order in everything over mtbf: saving, on average half an interval done again per failure,
    and restarting.

    Parameters
    ----------
    save_seconds : float
        For which training stops per checkpoint.
    restart_seconds : float
        From a failure to the first new step.
    """
    mtbf = gpu_hours_per_failure * 3600 / world_size
    interval = math.sqrt(2 * save_seconds * mtbf)
    saving = save_seconds / interval if interval else 0.0
    return Reliability(mtbf, interval, max(0.0, 1 - saving - (interval / 2 + restart_seconds) / mtbf))
