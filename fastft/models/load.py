"""Models and tokenizers through transformers' Auto classes, with every failure turned into a sentence."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from fastft import mapped
from fastft.config import Model
from fastft.errors import UserError
from fastft.lazy import torch

log = logging.getLogger(__name__)


def dtype_of(name: str) -> torch.dtype:
    """fp32 or bf16, as the configuration says it."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def dtype_in(settings: Model) -> str:
    """The dtype of a model folder's weights, by its config: bf16, or fp32 for all others."""
    return "bf16" if config(settings).dtype == torch.bfloat16 else "fp32"


def kept_in_fp32(model: torch.nn.Module, dtype: torch.dtype) -> re.Pattern | None:
    """Names of weights that transformers holds in float32 whatever dtype is asked for, by the lists that its classes
    carry (routers of DeepSeek-V3, GLM-4 MoE and others); None: there are none.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    lists = (getattr(module, "_keep_in_fp32_modules_strict", None) or [] for module in model.modules())
    names = sorted({name.replace("*", ".*") for names in lists for name in names})
    return re.compile("|".join(names)) if names else None


def go_offline() -> None:
    """From here on nothing asks the hub (also for processes started later)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # read at import time, which may be past
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.config.HF_HUB_OFFLINE = True


def _from_pretrained(loader, path: str, what: str, **kwargs):
    from safetensors import SafetensorError

    from fastft.models import paths, weight_files

    paths.check(path, what)
    paths.check_hub(path, what)
    try:
        return loader.from_pretrained(
            str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path, **kwargs
        )
    except UserError:
        raise
    except Exception as e:  # of transformers, of safetensors, or of the model's own code
        if broken := weight_files.broken(Path(path).expanduser()):
            raise UserError(
                f"{what} path {path}: cannot be loaded: {broken}.", "Copy the file again, or take another folder."
            ) from None
        known = isinstance(e, (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError))
        reason = ("" if known else f"{type(e).__name__}: ") + str(e).strip().split("\n\n")[0][:600]
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


def starts_twice(tokenizer: Any, ids: list[int]) -> bool:
    """Whether a text that begins with BOS was given another by the tokenizer."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(ids[:2]) == [bos, bos]


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


def generation_config(settings: Model, default: Any = None) -> Any:
    """The generation config in the model's folder; where it has none ``default``, or what its config says of it."""
    import transformers

    path = str(Path(settings.path).expanduser())
    try:
        return transformers.GenerationConfig.from_pretrained(path, revision=settings.revision or "main")
    except (OSError, ValueError):
        return default or transformers.GenerationConfig.from_model_config(config(settings))


_offsets: dict[str, int] = {}  # a model's config as JSON -> the number of a sequence's first position


def position_offset(model_config) -> int:
    """The number of a sequence's first position: 0, or padding_idx + 1 in the families that derive positions from the
    tokens beside padding (RoBERTa and those made after it), whose position table is longer by as much.
    """
    if getattr(model_config, "pad_token_id", None) is None:
        return 0
    key = model_config.to_json_string(use_diff=False)
    if key not in _offsets:
        _offsets[key] = _offset_of_table(model_config)
    return _offsets[key]


def _offset_of_table(model_config) -> int:
    """Of the position table of a model without weights; 0 where it has none, or cannot be made."""
    import transformers

    mapping = transformers.AutoModel._model_mapping
    if type(model_config) not in mapping:
        return 0
    from transformers.models.auto.auto_factory import _get_model_class

    try:
        with torch.device("meta"):
            model = _get_model_class(model_config, mapping)(copy.deepcopy(model_config))
    except Exception:  # whatever its code says of this config is said when the model is built
        return 0
    for name, module in model.named_modules():
        owner = model.get_submodule(name.rpartition(".")[0])
        padding = getattr(module, "padding_idx", None)
        if padding is None or "position" not in name.rpartition(".")[2]:
            continue
        if any(hasattr(place, DERIVED) for place in (owner, sys.modules[type(owner).__module__])):
            return padding + 1
    return 0


DERIVED = "create_position_ids_from_input_ids"  # what those families call it, as a function or a method


def length_limit(model_config) -> int | None:
    """Longest sequence that the model's positions allow; None when there is no such limit."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(text, name, None), int) and value > 0:
            return value - position_offset(text)
    return None


def start_of_decoder(model_config) -> int | None:
    """The token that an encoder-decoder model's decoder starts with, by its config; None: it does not say."""
    own = getattr(model_config, "decoder_start_token_id", None)
    decoder = getattr(model_config, "decoder", None)
    return own if own is not None or decoder is None else getattr(decoder, "decoder_start_token_id", None)


def is_of(model_config, auto_class: str) -> bool:
    """Whether a saved model is of a class that an Auto class chooses, also where its name does not say so (Gemma 3's
    text and vision model generates text as ``Gemma3ForConditionalGeneration``).
    """
    import transformers

    mapping = getattr(transformers, auto_class)._model_mapping
    if type(model_config) not in mapping:
        return False
    classes = mapping[type(model_config)]
    names = {c.__name__ for c in (classes if isinstance(classes, (tuple, list)) else (classes,))}
    return bool(names & set(model_config.architectures or []))


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


def written_rows(model: torch.nn.Module) -> int:
    """Tokens that the model can write: rows of its output head, or of the embedding where it has none."""
    head: Any = model.get_output_embeddings  # a method, too
    from fastft.zero.parameters import whole_shape

    return vocabulary_rows(model) if head() is None else whole_shape(head().weight)[0]


def build(
    settings: Model,
    auto_class: str,
    new_parameters: tuple[str, ...],
    seed: int,
    device: torch.device | str = "cpu",
    making: Any = None,
    **overrides: Any,
):
    """The model, ready to train.

    Parameters
    ----------
    auto_class : str
        Name of a transformers Auto class.
    device : device
        Where weights of model.init: random are drawn; others are loaded to the CPU.
    new_parameters : tuple of str
        Name parts of weights that may be newly initialized (a head); any other missing weight is an error.
    making : Making, optional
        Each rank keeps its part of every parameter (fastft.zero.making): files are mapped, and not read yet.
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
    if settings.attention not in ("auto", "varlen"):  # which is put into the model (fastft.models.documents)
        common["attn_implementation"] = settings.attention
    if settings.init == "random":
        with making.constructing() if making else contextlib.nullcontext(), torch.device(device):
            return _ready(loader.from_config(model_config, **common), common["dtype"]), []
    options = {**common, "config": model_config, "revision": settings.revision, "output_loading_info": True}
    # Other sizes are reported, not raised: what the weights' own error says to do would be wrong here.
    how: dict[str, Any] = {"ignore_mismatched_sizes": True, **options}
    if found := _deferred(loader, settings.path, **how) if making else None:
        model, info = found
        making.hold(model)
    else:
        torch.manual_seed(seed)  # a new head may have drawn from it
        model, info = _from_pretrained(loader, settings.path, "model", **how)
        mapped.let_go_between([*model.parameters(), *model.buffers()])
        if making:
            log.warning("%s is not loaded in parts: its class changes weights, or looks at them.", settings.path)
    missing = sorted(info["missing_keys"])
    if other := sorted(info["mismatched_keys"]):
        _check_sizes(settings, other, new_parameters)
        missing = sorted({*missing, *(name for name, *_ in other)})
    # By whole parts of the name: a BERT layer's "output.dense" is not a new head.
    if strange := [name for name in missing if not set(name.split(".")) & set(new_parameters)]:
        raise UserError(
            f"model path {settings.path}: the weights of {len(strange)} parameters are missing for "
            f"{type(model).__name__}: {', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}.",
            "The folder holds another kind of model; choose the task that fits it, or model.init: random.",
        )
    return _ready(model, common["dtype"], making if found else None), missing


def _deferred(loader: Any, path: str, **how: Any) -> Any:
    """What from_pretrained returns, of weights that are not read yet (fastft.models.deferred); None: it could not, for
    its files (a whole load says what is wrong) or for the model's class, for which the weights must be there.
    """
    from fastft.models.deferred import Deferred, from_files

    try:
        with from_files():
            found = _from_pretrained(loader, path, "model", **how)
    except UserError:
        return None
    return None if Deferred.written else found


def _ready(model: Any, dtype: torch.dtype, making: Any = None) -> Any:
    """Parameters that transformers left in float32 without a reason (XLNet's attention), to the dtype asked for; those
    that its class computes and never saves (Marian's sinusoidal positions) frozen, though it would train them: what is
    saved would be another model.
    """
    kept = kept_in_fp32(model, dtype)
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, p in model.named_parameters():
        if name in computed:
            p.requires_grad_(False)
        if p.is_floating_point() and p.dtype != dtype and not (kept and kept.search(name)):
            if making:
                making.cast(p, dtype)
            else:
                p.data = p.data.to(dtype)
    return model


def _check_sizes(settings: Model, other: list[tuple], new_parameters: tuple[str, ...]) -> None:
    """UserError for weights of another size than the model's, unless they are a head that is to begin anew."""
    name, stored, wanted = other[0]
    sizes = f"{name} is {tuple(stored)} in the folder, and would be {tuple(wanted)} here"
    if not all(set(name.split(".")) & set(new_parameters) for name, *_ in other):
        raise UserError(
            f"model path {settings.path}: {sizes}.", "Its config.json and its weights belong to different models."
        )
    if not settings.new_head:
        raise UserError(
            f"model path {settings.path}: holds a head with {stored[0]} outputs, the data needs {wanted[0]} ({sizes}).",
            "Set model.new_head: true to start with a new head, or use data with the labels that it was trained for.",
        )


def new_head(model: Any, new_parameters: tuple[str, ...]) -> list[str]:
    """Initialize the task's head anew, as its class does; names of the parameters. A pooler, which comes with the
    pretrained weights where there is one, stays.
    """
    parts = set(new_parameters) - {"pooler"}
    found = [name for name, _ in model.named_parameters() if set(name.split(".")) & parts]
    for owner in {name.rpartition(".")[0] for name in found}:
        module = model.get_submodule(owner)
        for thing in (module, *module.parameters(recurse=False)):
            thing._is_hf_initialized = False
        model._init_weights(module)
    return found


def resize(model: Any, tokenizer: Any) -> None:
    """A row of the input embedding (and of the output head, where there is one) for every token."""
    if len(tokenizer) > vocabulary_rows(model):
        model.resize_token_embeddings(len(tokenizer))


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
