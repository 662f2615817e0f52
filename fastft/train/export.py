"""Export to a Hugging Face folder: safetensors weights, config, tokenizer; written aside, reloaded, compared, then put in place."""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from fastft.errors import UserError
from fastft.models.load import DTYPES
from fastft.tasks import Task
from fastft.train.engine import Ranks


def save_engine(engine, task: Task, folder: Path, dtype: str, ranks: Ranks) -> Path:
    """Export the engine's weights; all ranks take part (under ZeRO-3 they gather), rank 0 writes."""
    if engine.zero_optimization_partition_weights():
        state = engine._zero3_consolidated_16bit_state_dict()  # named so, but it keeps the parameters' own dtype
    else:
        state = engine.module.state_dict() if ranks.main else None
    if ranks.main:
        save(engine.module, state, task, folder, dtype)
    dist.barrier()
    return folder


def save(model: torch.nn.Module, state: dict[str, torch.Tensor], task: Task, folder: Path, dtype: str) -> Path:
    """Write model and tokenizer to folder.

    Raises
    ------
    UserError
        What was read back differs from what was written (a failing disk, or weights that the model class does not save).
    """
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    state = {name: tensor.detach().to("cpu", DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype).contiguous() for name, tensor in state.items()}
    model.save_pretrained(scratch, state_dict=state)
    task.tokenizer.save_pretrained(scratch)
    _compare(scratch, state, model)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder


def _compare(folder: Path, state: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Reload through the model's own class and compare every tensor, bit for bit."""
    reloaded = type(model).from_pretrained(folder, dtype="auto").state_dict()
    for name, tensor in state.items():
        if name not in reloaded or not torch.equal(reloaded[name], tensor):
            raise UserError(f"{folder}: {name} read back differs from what was exported.", "The training checkpoint is intact; export again with `fastft export`.")
