"""What evaluations call: the model, or the engine around it, and generation by either."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastft.errors import UserError, did_you_mean
from fastft.lazy import torch

log = logging.getLogger(__name__)

USUAL_LENGTH = 20  # what transformers takes for max_length where nobody set it
ONE_TOKEN: dict[str, Any] = {"max_new_tokens": 1, "max_length": None, "min_new_tokens": None, "min_length": None}


class Forward:
    """A model that is called, and generates.

    Parameters
    ----------
    call : callable
        The model, or the engine around it.
    model : Module
        The Hugging Face model itself.
    synced : bool
        Whether ranks hold the weights in shards (ZeRO-3): all of them must then call ``generate`` equally often, and
        each goes on until the last one is done.
    """

    def __init__(self, call: Callable, model: Any, synced: bool = False):
        self.call, self.model, self.synced = call, model, synced

    def __call__(self, **inputs: Any) -> Any:
        return self.call(**inputs)

    def generate(self, inputs: Mapping[str, torch.Tensor], dummy: bool = False, **options: Any) -> Any:
        """Transformers' ``generate`` by the model's own generation config, without sampling.

        Parameters
        ----------
        inputs : mapping
            ``input_ids`` and ``attention_mask``, (rows, width) int64.
        dummy : bool
            This rank has nothing to generate; None is returned, after keeping step with the others where they need it.
        **options
            Of ``generate``, over those of the generation config.

        Returns
        -------
        Tensor or None
            (rows, width) int64, padded behind each end.
        """
        if dummy and not self.synced:
            return None
        if dummy:
            options |= ONE_TOKEN
        own: Any = self.model.generate
        found = own(**inputs, do_sample=False, num_return_sequences=1, synced_gpus=self.synced, **options)
        return None if dummy else found


def settle(model: Any, given: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Write into the model's generation config, which an export keeps, what evaluations generate by.

    Parameters
    ----------
    given : mapping
        Keys of transformers' GenerationConfig, over the model's own.
    longest : int
        ``max_new_tokens`` where neither says how long a text may become: transformers would stop at 20 tokens.

    Returns
    -------
    dict
        What differs from transformers' defaults, for the run's record.

    Raises
    ------
    UserError
        A key that GenerationConfig does not have, or values that it refuses.
    """
    config = model.generation_config
    known = {name for name in type(config)().to_dict() if not name.startswith("_")} - {"transformers_version"}
    if unknown := sorted(set(given) - known):
        raise UserError(
            f"evaluation.generation: {unknown[0]!r} is no key of transformers' GenerationConfig.",
            did_you_mean(unknown[0], known),
        )
    if "max_new_tokens" in given:
        config.max_length = None
    if "max_length" in given:
        config.max_new_tokens = None
    config.update(**given)
    if config.max_new_tokens is None and config.max_length in (None, USUAL_LENGTH) and "max_length" not in given:
        config.max_new_tokens, config.max_length = longest, None
    try:
        config.validate(strict=True)
    except (TypeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0][:300]
        raise UserError(f"evaluation.generation: {reason}", "It goes into the model's generation config.") from None
    return {name: value for name, value in config.to_diff_dict().items() if _is_json(name, value)}


def check_generates(model: Any, inputs: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """UserError when the model cannot generate by its generation config; tried on one token, before training."""
    from fastft.models.trial import REFUSALS, trial

    try:
        with trial(model, device):
            Forward(model, model).generate({name: value.to(device) for name, value in inputs.items()}, **ONE_TOKEN)
    except REFUSALS as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise UserError(
            f"evaluation.generation: {type(model).__name__} cannot generate by it: {reason}",
            "Its keys are those of transformers' GenerationConfig; an empty evaluation.metrics generates nothing.",
        ) from None


def _is_json(name: str, value: Any) -> bool:
    return not name.startswith("_") and name != "transformers_version" and value is not None
