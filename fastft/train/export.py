"""Export to a Hugging Face folder: safetensors weights, config, tokenizer; written aside, reloaded, compared, then put in place."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from fastft.errors import UserError
from fastft.files import replacing
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
    state = {
        name: tensor.detach().to("cpu", DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    if bad := [name for name, _ in model.named_parameters() if name in state and not state[name].isfinite().all()]:
        raise UserError(
            f"{folder}: not written: {', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''} hold NaN or Inf.",
            "The training diverged; export an older checkpoint with `fastft export --step`.",
        )
    with replacing(folder) as scratch:
        try:
            model.save_pretrained(
                scratch, state_dict=dict(state)
            )  # which takes tensors out of the mapping that it is given
            task.tokenizer.save_pretrained(scratch)
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{folder}: could not be written: {e}.",
                "Mend the disk, then `fastft resume` (a run) or `fastft export` writes it; the checkpoints are whole.",
            ) from None
        _compare(scratch, state, model)
    return folder


def _compare(folder: Path, state: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Reload through the model's own class and compare every tensor, bit for bit."""
    loaded, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    reloaded = loaded.state_dict()
    wrong = [
        name for name, tensor in state.items() if name not in reloaded or not _same_bits(reloaded[name], tensor)
    ] + sorted(info["missing_keys"])
    if wrong:
        raise UserError(
            f"{folder}: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''} read back differ from what was exported.",
            "The training checkpoint is intact; export again with `fastft export`.",
        )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
    )
