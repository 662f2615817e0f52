"""AdamW through fastft's own kernels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fastft import rooms
from fastft.config import Config, Optim
from fastft.optim.optimizers.base import ClientOptimizer, OptimizerSpec

Beta = Annotated[float, Field(ge=0, lt=1)]


class FusedAdamWSettings(Optim):
    """AdamW: Loshchilov and Hutter, arXiv 1711.05101."""

    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's decay rates.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    state_dtype: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="How Adam's two moments are kept: 8, 4 or 2 bytes per parameter; bf16 and int8 are rounded "
        "stochastically.",
    )
    master: Literal["auto", "fp32", "remainder", "stochastic"] = Field(
        "auto",
        description="model.dtype bf16: the weights that the optimizer updates. fp32: a copy of 4 bytes; remainder: the "
        "same number as bf16 and its 16-bit remainder; stochastic: bf16, rounded at random. The last two also keep "
        "gradients in bf16. auto: remainder at parallel.zero 0, where it is faster and the update the same, else fp32; "
        "the run's config.yaml says which.",
    )

    def settle(self, config: Config) -> None:
        if self.master == "auto":
            direct = config.model.dtype == "bf16" and config.parallel.zero == 0
            object.__setattr__(self, "master", "remainder" if direct else "fp32")

    def check(self, config: Config) -> None:
        if self.master in ("remainder", "stochastic") and config.model.dtype != "bf16":
            raise ValueError(
                f"optim.master: {self.master} needs model.dtype: bf16 (here {config.model.dtype}): nothing else has "
                "weights that it could replace"
            )


@rooms.OPTIMIZERS.register("fused_adamw")
class FusedAdamWSpec(OptimizerSpec):
    """AdamW in one pass over memory, its state in fp32, bf16 or int8."""

    Settings = FusedAdamWSettings
    state_tensors = ("exp_avg", "exp_avg_sq")
    decoupled = True

    def __init__(self, settings: Any, config: Config):
        super().__init__(settings, config)
        self.replaces_masters = settings.master in ("remainder", "stochastic")

    def build(self, groups: list[dict[str, Any]]) -> ClientOptimizer:
        from fastft.optim.adamw import FusedAdamW

        s = self.settings
        return FusedAdamW(
            groups,
            lr=s.lr,
            betas=s.betas,
            eps=s.eps,
            weight_decay=s.weight_decay,
            adam_w_mode=self.decoupled,
            state_dtype=s.state_dtype,
            stochastic_rounding=s.master == "stochastic",
            remainder=s.master == "remainder",
            seed=self.config.run.seed,
        )
