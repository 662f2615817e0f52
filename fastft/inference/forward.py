"""What evaluations call: the model, or the engine around it, and generation by either."""

from __future__ import annotations

import logging
import re
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


def settle(model: Any, given: Mapping[str, Any], longest: int, limit: int | None = None) -> dict[str, Any]:
    """Write into the model's generation config, which an export keeps, what evaluations generate by.

    Parameters
    ----------
    given : mapping
        Keys of transformers' GenerationConfig, over the model's own.
    longest : int
        ``max_new_tokens`` where neither says how long a text may become: transformers would stop at 20 tokens.
    limit : int or None
        Most tokens that can be generated, where positions of their own count them (those of a decoder beside an
        encoder).

    Returns
    -------
    dict
        What differs from transformers' defaults, for the run's record.

    Raises
    ------
    UserError
        A key that GenerationConfig does not have, values that it refuses, or texts beyond ``limit``.
    """
    config = mended(model.generation_config)
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
    try:
        config.update(**given)
        if config.max_new_tokens is None and config.max_length in (None, USUAL_LENGTH) and "max_length" not in given:
            config.max_new_tokens, config.max_length = longest, None
        if config.num_beams is not None and config.num_beams < 1:
            raise ValueError(f"`num_beams` must be at least 1, but is {config.num_beams}.")
        config.validate(strict=True)
    except (TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:400]
        raise UserError(f"evaluation.generation: {reason}", "It goes into the model's generation config.") from None
    most = config.max_new_tokens or (config.max_length or 1) - 1  # that one counts the token decoding starts with
    if limit is not None and most > limit:
        if {"max_new_tokens", "max_length"} & set(given):
            raise UserError(
                f"evaluation.generation: texts of {most} tokens are beyond the limit of {limit} positions of the "
                "model's decoder.",
                f"Set max_new_tokens to at most {limit}.",
            )
        config.max_new_tokens, config.max_length = longest, None
    return {name: value for name, value in config.to_diff_dict().items() if _is_json(name, value)}


def mended(config: Any) -> Any:
    """A model's generation config without what does nothing as the rest of it stands (a temperature where nothing is
    sampled). There are models that have it, and transformers saves it as it was loaded, but not once it was changed: a
    run would learn that at its end.

    Raises UserError for one that is wrong otherwise.
    """
    usual = type(config)()
    try:
        config.validate(strict=True)
    except ValueError as first:
        idle = re.findall(r"^- `(\w+)`", str(first), re.MULTILINE)  # the message has a line for each
        for name in idle:
            setattr(config, name, getattr(usual, name))
        try:
            config.validate(strict=True)
        except ValueError as e:
            reason = " ".join(str(e).split())[:400]
            raise UserError(f"The model's generation config: {reason}", "Fix its generation_config.json.") from None
        log.warning("the model's generation config: left out, for it does nothing there: %s", ", ".join(idle))
    return config


def check_generates(model: Any, inputs: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """UserError when the model cannot generate by its generation config; tried on one token, before training.

    ``inputs``: of two rows, for some ways to generate take only one.
    """
    from fastft.models.trial import REFUSALS, trial

    try:
        with trial(model, device):
            Forward(model, model).generate({name: value.to(device) for name, value in inputs.items()}, **ONE_TOKEN)
    except REFUSALS as e:
        reason = " ".join(str(e).split())[:400] or type(e).__name__
        raise UserError(
            f"evaluation.generation: {type(model).__name__} cannot generate by it: {reason}",
            "Its keys are those of transformers' GenerationConfig; an empty evaluation.metrics generates nothing.",
        ) from None


def _is_json(name: str, value: Any) -> bool:
    return not name.startswith("_") and name != "transformers_version" and value is not None
