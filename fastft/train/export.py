"""Export to a Hugging Face folder: weights, config, processor and a model card; written aside, reloaded, compared,
then put in place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastft.assemble import Job
from fastft.errors import UserError
from fastft.files import replacing
from fastft.models.load import dtype_of, kept_in_fp32
from fastft.train import model_card
from fastft.zero import weights


def save_engine(engine: Any, job: Job, folder: Path, results: dict | None = None) -> Path:
    """Export the engine's weights; all ranks take part (under ZeRO-3 they gather), rank 0 writes.

    ``results``: metrics and the like, for the model card.
    """
    state = weights.consolidated(engine, job.ranks.main)
    if job.ranks.main:
        assert state is not None
        save(job, state, folder, own_dtype(job), results)
    job.ranks.barrier()
    return folder


def own_dtype(job: Job) -> str:
    """What a model is exported in unless asked otherwise: the dtype that it came in, or the run's if that is shorter.

    An adapter, which is new, has the run's.
    """
    own = job.config.model.dtype
    return own if job.adapter_only else "bf16" if "bf16" in (job.came_in, own) else "fp32"


def save(
    job: Job,
    state: dict[str, torch.Tensor],
    folder: Path,
    dtype: str,
    results: dict | None = None,
    merge: bool = False,
) -> Path:
    """Write model, processor and model card to a folder.

    Parameters
    ----------
    state : dict
        Of ``job.model``, by name.
    dtype : str
        fp32 or bf16: of the floating-point weights.
    merge : bool
        Write the plain model that computes the same also where an edit (an adapter) has files of its own.

    Raises
    ------
    UserError
        What was read back differs from what was written (a failing disk, or weights that the model class does not
        save).
    """
    model, kind = job.model, dtype_of(dtype)
    trained = {name for name, _ in model.named_parameters()}
    if bad := [name for name in trained if name in state and not state[name].isfinite().all()]:
        raise UserError(
            f"{folder}: not written: {', '.join(sorted(bad)[:3])}{', ...' if len(bad) > 3 else ''} hold NaN or Inf.",
            "The training diverged; export an older checkpoint with `fastft export --step`.",
        )
    model.config.fastft_task = job.config.task  # for whoever opens the folder alone
    with replacing(folder) as scratch:
        try:
            scratch.mkdir()
            if merge or not any(edit.write(state, model, scratch, kind) for edit in job.edits):
                for edit in reversed(job.edits):
                    state = edit.merged(state, model, kind)
                kept = kept_in_fp32(model, kind)
                whole = {n: _exported(t, torch.float32 if kept and kept.search(n) else kind) for n, t in state.items()}
                model.save_pretrained(scratch, state_dict=dict(whole))  # which takes tensors out of the mapping
                _say_dtype(scratch / "config.json", kind)
                _compare(scratch, whole, model)
            job.task.processor.save_pretrained(scratch)
            model_card.write(scratch, job, results or {})
            for file in filter(Path.is_file, scratch.rglob("*")):  # safetensors lets nobody but the owner read its own
                file.chmod(scratch.stat().st_mode & 0o666)
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{folder}: could not be written: {e}.",
                "Fix the disk, then `fastft resume` (a run) or `fastft export` writes it; the checkpoints are whole.",
            ) from None
    return folder


def _say_dtype(config: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into a config.json, where transformers writes that of the model in memory: what
    loads the folder by itself goes by it.
    """

    def said(values: dict) -> dict:
        nested = {k: said(v) for k, v in values.items() if isinstance(v, dict) and "dtype" in v}  # text_config, ...
        return {**values, **nested, "dtype": str(dtype).removeprefix("torch.")}

    config.write_text(json.dumps(said(json.loads(config.read_text())), indent=2, sort_keys=True) + "\n")


def _exported(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _compare(folder: Path, state: dict[str, torch.Tensor], model: Any) -> None:
    """Reload through the model's own class and compare every tensor, bit for bit."""
    loaded, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    reloaded = loaded.state_dict()
    wrong = [name for name, t in state.items() if name not in reloaded or not _same_bits(reloaded[name], t)]
    wrong += sorted(info["missing_keys"])
    if wrong:
        raise UserError(
            f"{folder}: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''} read back differ from what was "
            "exported.",
            "The training checkpoint is intact; export again with `fastft export`.",
        )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype != b.dtype and a.is_floating_point() and b.is_floating_point():
        # Some classes hold parameters in float32 whatever is asked for (XLNet's mask_emb): the values must be the same.
        a, b = a.double(), b.double()
    if a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
