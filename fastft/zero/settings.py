"""DeepSpeed's settings for a run: those that follow from the YAML, and those that parallel.deepspeed adds."""

import json
import logging
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.errors import UserError, did_you_mean
from fastft.optim.optimizers.base import OptimizerSpec
from fastft.ranks import Ranks

# DeepSpeed settings that follow from the YAML; a second source for them would be a contradiction waiting to happen.
OWNED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "gradient_clipping",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "gradient_predivide_factor",
    "prescale_gradients",
}


def deepspeed_config(config: Config, ranks: Ranks) -> dict:
    """DeepSpeed's settings for this run: those that follow from the YAML, plus parallel.deepspeed.

    Raises
    ------
    UserError
        parallel.deepspeed names a missing or broken file, or a key that fastft sets itself.
    """
    zero, spec = config.parallel.zero, OptimizerSpec.of(config)
    bf16 = config.model.dtype == "bf16"
    # Stage 0 keeps gradients whole: where DeepSpeed needs no masters of its own, the optimizer takes the model's
    # parameters and gradients as they are, and clips in its pass.
    direct = not zero and (not bf16 or spec.replaces_masters)
    clip = 0.0 if direct else config.optim.grad_clip or 0.0
    settings: dict[str, Any] = {
        # The loop sets the accumulation boundary itself and normalises the loss itself, so these only have to be
        # consistent.
        "train_batch_size": ranks.world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": zero, **_offload(config, ranks)},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
    }
    if bf16 and direct:
        settings["communication_data_type"] = "bf16"  # of gradients; it would be fp32
    elif bf16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if spec.replaces_masters:
            # Without bf16_optimizer_states DeepSpeed insists on its own CPU optimizer; how the state is kept is ours
            # to say.
            settings["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    extra = config.parallel.deepspeed
    if isinstance(extra, str):
        try:
            extra = json.loads(Path(extra).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:  # ValueError: broken JSON, not UTF-8, a number too long
            raise UserError(
                f"parallel.deepspeed: {extra}: {e}",
                "Give a JSON file of DeepSpeed settings, or write them as a mapping.",
            ) from None
    if not isinstance(extra, dict | None):
        raise UserError(f"parallel.deepspeed: a {type(extra).__name__}, not a mapping of DeepSpeed settings.")
    for key, value in (extra or {}).items():
        if key in OWNED:
            raise UserError(
                f"parallel.deepspeed: {key!r} follows from the rest of the configuration.",
                "Remove it there; set batch, optim or model instead.",
            )
        if key == "zero_optimization":
            if not isinstance(value, dict):
                raise UserError(f"parallel.deepspeed: zero_optimization is a {type(value).__name__}, not a mapping.")
            if value.get("stage", zero) != zero:
                raise UserError(
                    f"parallel.deepspeed: zero_optimization.stage = {value['stage']} contradicts "
                    f"parallel.zero = {zero}.",
                    "Set parallel.zero.",
                )
            for name in OFFLOADS:
                _check_offload(name, value.get(name), config)
            if value.get("elastic_checkpoint"):
                raise UserError(
                    "parallel.deepspeed: zero_optimization.elastic_checkpoint keeps the optimizer's state in a form "
                    "that DeepSpeed itself cannot go on from.",
                    "Remove it: a run resumes with other ranks as it is.",
                )
            settings[key] = {**settings[key], **value, "stage": zero}
        else:
            settings[key] = value
    if extra:
        _check_deepspeed(settings)
    return settings


OFFLOADS = ("offload_optimizer", "offload_param")


def _offload(config: Config, ranks: Ranks) -> dict[str, dict]:
    """DeepSpeed's settings for parallel.offload."""
    folder = config.parallel.offload_dir
    planned = ranks.device.type == "meta"  # perhaps for other machines
    if folder is not None and not planned and not Path(folder).is_dir():
        raise UserError(f"parallel.offload_dir: {folder}: no such folder.", "Make it, on every host.")
    names = {None: (), "optimizer": OFFLOADS[:1], "parameters": OFFLOADS}[config.parallel.offload]
    return {name: {"device": "cpu", "pin_memory": ranks.device.type == "cuda"} for name in names}


def _check_offload(name: str, value: Any, config: Config) -> None:
    """UserError for offloading in parallel.deepspeed beside parallel.offload, or to a disk."""
    if value is None:
        return
    if config.parallel.offload is not None:
        raise UserError(
            f"parallel.deepspeed: zero_optimization.{name} and parallel.offload: {config.parallel.offload} both say "
            "where state is kept.",
            "Remove one of the two.",
        )
    if isinstance(value, dict) and value.get("device") == "nvme":
        raise UserError(
            f"parallel.deepspeed: zero_optimization.{name}.device: nvme: what DeepSpeed keeps on a disk is in no "
            "checkpoint of fastft.",
            "parallel.offload keeps it in the host's memory.",
        )


def _check_deepspeed(settings: dict) -> None:
    """Let DeepSpeed read the settings, and refuse what it refuses, and every key that it did not ask for (it would
    ignore it in silence).
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    read = _Asked(
        {key: value for key, value in settings.items() if key != "train_batch_size"}
    )  # which hangs on the number of ranks
    try:
        DeepSpeedConfig(read)
    except Exception as e:  # pydantic's, DeepSpeed's own, and whatever a value of the wrong type runs into
        raise UserError(f"parallel.deepspeed: {e}", "DeepSpeed's documentation lists its keys.") from None
    if unknown := sorted(set(read) - read.asked):
        raise UserError(
            f"parallel.deepspeed: DeepSpeed knows no {', '.join(unknown)}.", did_you_mean(unknown[0], read.asked)
        )


class _Asked(dict):
    """A dict that remembers which keys it was asked for."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked: set[str] = set()

    def __copy__(self) -> "_Asked":
        return self

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key) -> bool:
        self.asked.add(key)
        return super().__contains__(key)
