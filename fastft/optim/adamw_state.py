"""FusedAdamW's state of one param: its first values, its dtypes, and its way through state dicts.

Codes are float32 in a state dict, so that torch.optim.AdamW and DeepSpeed can read it; what is loaded is converted to
the dtypes of the optimizer that loads it.
"""

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from fastft import mapped
from fastft.ops import quantized_state
from fastft.ops.adamw import state_dtype as default_dtype

log = logging.getLogger(__name__)

StateDtype = Literal["fp32", "bf16", "int8"]
State = dict[str, Tensor]  # of one param, as FusedAdamW's docstring lists it


def stored_dtype(state_dtype: StateDtype, param: Tensor) -> torch.dtype:
    """In which exp_avg, exp_avg_sq and max_exp_avg_sq of a param are stored."""
    return {"fp32": default_dtype(param.dtype), "bf16": torch.bfloat16, "int8": torch.uint8}[state_dtype]


def fill(state: State, param: Tensor, *, amsgrad: bool, remainder: bool) -> None:
    """The state before the first step, moments still in the default dtype (see `convert`)."""

    def zeros(dtype: torch.dtype) -> Tensor:
        return mapped.zeros_like(param, dtype)

    wide = default_dtype(param.dtype)
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    state["exp_avg"] = zeros(wide)
    state["exp_avg_sq"] = zeros(wide)
    if amsgrad:
        state["max_exp_avg_sq"] = zeros(wide)
    if remainder:
        state["remainder"] = zeros(torch.int16)


def convert(state: State, param: Tensor, wanted: torch.dtype, *, remainder: bool) -> None:
    """Give the moments of a param the dtype `wanted`, and it a remainder or none."""
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if name not in state or state[name].dtype == wanted:
            continue
        wide = decoded(name, state).to(param.device)
        state.pop(f"{name}_scale", None)
        if wanted == torch.uint8:
            state[name], state[f"{name}_scale"] = quantized_state.quantize(wide, signed=name == "exp_avg")
        else:
            state[name] = wide.to(wanted)
        state[name] = mapped.beside(param, state[name])
    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
    if remainder and "remainder" not in state:
        log.warning(
            "the checkpoint has no remainder of a bfloat16 param: its fp32 master starts from the rounded param"
        )
        state["remainder"] = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
    elif not remainder:
        state.pop("remainder", None)


def decoded(name: str, state: State) -> Tensor:
    """exp_avg, exp_avg_sq or max_exp_avg_sq as numbers."""
    if state[name].dtype != torch.uint8:
        return state[name]
    return quantized_state.dequantize(state[name], state[f"{name}_scale"], signed=name == "exp_avg")


def decoded_state(state: Any) -> Any:
    """A state dict's entry without codes; what is no state of codes is returned as it is."""
    if not isinstance(state, dict) or "exp_avg_scale" not in state:
        return state
    scales = ("exp_avg_scale", "exp_avg_sq_scale")
    return {
        name: decoded(name, state) if isinstance(value, Tensor) else value
        for name, value in state.items()
        if name not in scales
    }


class Kept:
    """Carries a state tensor past torch.optim.Optimizer.load_state_dict, which would cast it to the param's dtype."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def keep_tensors(_optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load_state_dict pre-hook: every state tensor in a `Kept`."""
    state = {
        key: {name: Kept(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if isinstance(values, dict)
        else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def restored(name: str, value: Any, param: Any) -> Any:
    """A loaded state value where step() wants it; its dtype is the business of `convert`."""
    tensor = value.tensor if isinstance(value, Kept) else value
    if not isinstance(param, Tensor):
        return tensor
    if name == "step":  # a plain number in old checkpoints, on the host in torch's
        return torch.as_tensor(tensor, dtype=torch.float32, device=param.device)
    return tensor.to(device=param.device) if isinstance(value, Kept) else tensor
