"""Models and tokenizers through transformers' Auto classes, with every failure turned into a sentence."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from fastft.config import Model
from fastft.errors import UserError
from fastft.lazy import torch


def dtype_of(name: str) -> torch.dtype:
    """fp32 or bf16, as the configuration says it."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def go_offline() -> None:
    """From here on nothing asks the hub (also for processes started later)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # read at import time, which may be past


def check_path(path: str, what: str) -> None:
    """A local path must exist and hold a config; anything else must look like a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and what == "model":
            raise UserError(
                f"{what} path {path}: the folder holds no config.json.", "Give a folder written by save_pretrained."
            )
        return
    if folder.exists():
        raise UserError(f"{what} path {path}: is a file; expected a folder written by save_pretrained.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        near = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = (
            f"In {folder.parent} there are: {', '.join(sorted(near)[:20])}."
            if near
            else "Give a local folder or a hub id (owner/name)."
        )
        raise UserError(f"{what} path {path}: no such folder.", hint)


def _from_pretrained(loader, path: str, what: str, **kwargs):
    from safetensors import SafetensorError

    check_path(path, what)
    try:
        return loader.from_pretrained(
            str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path, **kwargs
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as e:
        if isinstance(e, UserError):
            raise
        reason = str(e).strip().split("\n\n")[0][:600]
        raise UserError(
            f"{what} path {path}: cannot be loaded: {reason}",
            "Give a local folder written by save_pretrained, or a hub id that is in the cache or within reach.",
        ) from None


def tokenizer(settings: Model):
    """The tokenizer, with a padding token: its own, or the end-of-sequence token."""
    import transformers

    path = settings.tokenizer or settings.path
    found = _from_pretrained(
        transformers.AutoTokenizer,
        path,
        "tokenizer",
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    if len(found) == 0:
        raise UserError(
            f"tokenizer path {path}: the tokenizer has an empty vocabulary.",
            "The folder must hold the tokenizer's own files (tokenizer.json); or set model.tokenizer.",
        )
    if found.pad_token_id is None:
        if found.eos_token_id is None:
            raise UserError(
                f"tokenizer {path}: has neither a padding nor an end-of-sequence token.", "Add pad_token to its files."
            )
        found.pad_token = found.eos_token
    return found


def config(settings: Model):
    """The transformers config of the model."""
    import transformers

    return _from_pretrained(
        transformers.AutoConfig,
        settings.path,
        "model",
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


# Families that number positions from padding_idx + 1.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text")


def position_offset(model_config) -> int:
    """The number of a sequence's first position."""
    return model_config.pad_token_id + 1 if model_config.model_type in OFFSET_POSITIONS else 0


def length_limit(model_config) -> int | None:
    """Longest sequence that the model's positions allow; None when there is no such limit."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(text, name, None), int) and value > 0:
            return value - position_offset(text)
    return None


def class_takes(model_config, auto_class: str, name: str) -> bool:
    """Whether the forward of the class that an Auto class would choose has an argument of this name.

    DistilBERT has no token_type_ids. Asked of the class, for a model may be wrapped in others.
    """
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    mapping = getattr(transformers, auto_class)._model_mapping
    if type(model_config) not in mapping:  # code that comes with the model
        return False
    return name in inspect.signature(_get_model_class(model_config, mapping).forward).parameters


def vocabulary_rows(model: torch.nn.Module) -> int:
    """Rows of the model's input embedding, also where ZeRO-3 holds it in shards."""
    embeddings: Any = model.get_input_embeddings  # a method, which nn.Module's type does not know
    from fastft.zero.parameters import whole_shape

    return whole_shape(embeddings().weight)[0]


def build(settings: Model, auto_class: str, new_parameters: tuple[str, ...], seed: int, **overrides):
    """The model, ready to train, on the CPU.

    Parameters
    ----------
    auto_class : str
        Name of a transformers Auto class.
    new_parameters : tuple of str
        Name parts of weights that may be newly initialized (a head); any other missing weight is an error.
    **overrides
        Config attributes (``num_labels``, or a task's own), which an export keeps.

    Returns
    -------
    (model, list of str)
        The model and the names of weights that were newly initialized.
    """
    import transformers

    loader = getattr(transformers, auto_class)
    torch.manual_seed(seed)
    model_config = config(settings)
    for name, value in overrides.items():  # not by from_pretrained, which takes only names that the config has already
        setattr(model_config, name, value)
    common: dict[str, Any] = {"dtype": dtype_of(settings.dtype), "trust_remote_code": settings.trust_remote_code}
    if settings.attention != "auto":
        common["attn_implementation"] = settings.attention
    if settings.init == "random":
        return loader.from_config(model_config, **common), []
    options = {**common, "config": model_config, "revision": settings.revision, "output_loading_info": True}
    model, info = _from_pretrained(loader, settings.path, "model", **options)
    missing = sorted(info["missing_keys"])
    # By whole parts of the name: a BERT layer's "output.dense" is not a new head.
    if strange := [name for name in missing if not set(name.split(".")) & set(new_parameters)]:
        raise UserError(
            f"model path {settings.path}: the weights of {len(strange)} parameters are missing for "
            f"{type(model).__name__}: {', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}.",
            "The folder holds another kind of model; choose the task that fits it, or model.init: random.",
        )
    return model, missing


def freeze(model: torch.nn.Module, patterns: list[str]) -> int:
    """Set requires_grad = False on parameters matching any fnmatch pattern; their number of elements."""
    import fnmatch

    for pattern in patterns:
        names = [n for n, _ in model.named_parameters()]
        if not (hits := fnmatch.filter(names, pattern)):
            raise UserError(
                f"model.freeze: {pattern!r} matches no parameter.",
                f"Names look like: {', '.join(names[:3])}, ..., {names[-1]}.",
            )
        for name in hits:
            model.get_parameter(name).requires_grad_(False)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("model.freeze leaves nothing to train.", "Remove a pattern.")
    return frozen
