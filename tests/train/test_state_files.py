"""A nested state in a safetensors file, and back."""

import json
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import safe_open

from fastft.zero import state_files


def through(state, folder: Path):
    path = folder / "x.safetensors"
    with open(path, "wb") as file:
        state_files.write(state, file)
    assert state_files.refused(path) is None
    return state_files.read(path)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -(1 << 70),
        0.1,
        "é",
        "",
        [],
        (),
        {},
        [1, (2, [3])],
        {1: "a", "1": "b", (1, 2): None},
        {"tensor": 0},  # a key of the form itself
        {"dict": [["a", 1]]},
        {"x", "y"},
        torch.Size([2, 3]),
        torch.bfloat16,
        ZeroStageEnum.weights,
        fragment_address(numel=3, start=4),
        OrderedDict([("b", 1), ("a", 2)]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_value_comes_back_as_it_was(tmp_path, value):
    found = through({"v": value}, tmp_path)["v"]
    assert found == value and type(found) is type(value)


def test_numbers_that_json_has_not(tmp_path):
    a, b, c = through({"v": [math.inf, -math.inf, math.nan]}, tmp_path)["v"]
    assert (a, b) == (math.inf, -math.inf) and math.isnan(c)
    assert through({"v": LossScaler(8.0)}, tmp_path)["v"].cur_scale == 8.0


@pytest.mark.parametrize("dtype", list(state_files.CODES), ids=str)
def test_tensors_of_every_dtype(tmp_path, dtype):
    """With odd sizes between them, so that nothing would be aligned by chance."""
    given = [torch.ones(3, dtype=torch.uint8), torch.tensor([[0, 1, 2]]).to(dtype), torch.tensor(1).to(dtype)]
    given += [torch.zeros(0, dtype=dtype), torch.arange(6).to(dtype).view(2, 3).T]
    for a, b in zip(through({"v": given}, tmp_path)["v"], given, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape


def test_a_module_keeps_the_versions_of_its_state(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    found = through(state, tmp_path)
    assert found._metadata == state._metadata and torch.nn.BatchNorm1d(2).load_state_dict(found)


def test_what_is_no_state_is_not_written(tmp_path):
    with pytest.raises(TypeError, match=r"pathlib.*cannot be kept in a checkpoint"):
        through({"p": tmp_path}, tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_are_not_kept(tmp_path, dtype):
    with pytest.raises(TypeError, match=f"{dtype} cannot be kept in a checkpoint"):
        through({"p": torch.zeros(1).to(dtype)}, tmp_path)


def test_anyone_can_read_the_tensors(tmp_path):
    through({"a": {"w": torch.arange(4.0)}}, tmp_path)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"]) == {"dict": [["a", {"dict": [["w", {"tensor": 0}]]}]]}
        assert torch.equal(file.get_tensor("0"), torch.arange(4.0))
