"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math

from fastft.config import Optim
from fastft.registry import Registry

SCHEDULES: Registry = Registry("schedule")


def learning_rate(settings: Optim, step: int, total: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``total``.

    Warm-up rises linearly from lr/warmup at step 0 ... to lr at step warmup, as transformers counts it: factor
    step/warmup, so the very first step has factor 0 there; here it is (step + 1)/(warmup + 1), which wastes no step.
    """
    warmup = steps_of(settings.warmup, total)
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    return settings.lr * SCHEDULES.get(settings.schedule)(settings, step - warmup, max(1, total - warmup))


def steps_of(value: int | float, total: int) -> int:
    """An integer counts steps, a fraction is of the total."""
    return value if isinstance(value, int) else math.ceil(value * total)


@SCHEDULES.register("constant")
def constant(settings: Optim, step: int, total: int) -> float:
    return 1.0


@SCHEDULES.register("linear")
def linear(settings: Optim, step: int, total: int) -> float:
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * max(0.0, 1 - step / total)


@SCHEDULES.register("cosine")
def cosine(settings: Optim, step: int, total: int) -> float:
    """Half a cosine (Loshchilov and Hutter 2017)."""
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


@SCHEDULES.register("wsd")
def warmup_stable_decay(settings: Optim, step: int, total: int) -> float:
    """Constant, then a linear fall over the last ``decay`` steps (Hu et al. 2024, MiniCPM)."""
    decay = max(1, min(total, steps_of(settings.decay, total)))
    left = (total - step) / decay
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * max(0.0, min(1.0, left))
