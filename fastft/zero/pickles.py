"""DeepSpeed's files are pickles: read by torch's restricted unpickler, which calls nothing but what it knows and the
three plain classes of DeepSpeed that a checkpoint holds. A file that names anything else is not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


def _classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def load(path: Path | str, **options: Any) -> Any:
    """As `torch.load` with these options. Raises UnpicklingError for a file that holds more than state."""
    try:
        return torch.load(path, weights_only=True, **options)
    except UnpicklingError:
        with torch.serialization.safe_globals(_classes()):
            return torch.load(path, weights_only=True, **options)


def refused(path: Path) -> str | None:
    """Why a file is not read by anyone, DeepSpeed's converters included; None: it holds state alone. Its tensors are
    mapped, not read.
    """
    try:
        load(path, mmap=True, map_location="cpu")
    except UnpicklingError as e:
        named = re.search(r"GLOBAL ([\w.]+)", str(e))
        return f"it holds {named[1]}, which is no state" if named else "it holds more than state"
    except RuntimeError as e:
        return (str(e).strip() or type(e).__name__).splitlines()[0][:200]
    return None
