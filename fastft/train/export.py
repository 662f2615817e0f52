"""Export to a Hugging Face folder: weights, config, processor and a model card; written aside, reloaded, compared,
then put in place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastft.assemble import Job
from fastft.errors import UserError
from fastft.files import replacing
from fastft.models import weight_files
from fastft.models.load import dtype_of, kept_in_fp32
from fastft.train import model_card
from fastft.zero import weights


def save_engine(engine: Any, job: Job, folder: Path, results: dict | None = None) -> Path:
    """Export the engine's weights; all ranks take part (under ZeRO-3 they gather), rank 0 writes.

    ``results``: metrics and the like, for the model card.
    """
    with job.ranks.main_alone():
        if engine.zero_optimization_partition_weights():
            gathered = weights.Gathered(engine, job.ranks)
            if job.ranks.main:
                try:
                    save(job, gathered, folder, own_dtype(job), results)
                finally:
                    gathered.close()
            else:
                gathered.follow()
        elif job.ranks.main:
            save(job, engine.module.state_dict(), folder, own_dtype(job), results)
    return folder


def own_dtype(job: Job) -> str:
    """What a model is exported in unless asked otherwise: the dtype that it came in, or the run's if that is shorter.

    An adapter, which is new, has the run's.
    """
    own = job.config.model.dtype
    return own if job.adapter_only else "bf16" if "bf16" in (job.came_in, own) else "fp32"


def save(
    job: Job,
    state: Mapping[str, torch.Tensor],
    folder: Path,
    dtype: str,
    results: dict | None = None,
    merge: bool = False,
) -> Path:
    """Write model, processor and model card to a folder.

    Parameters
    ----------
    state : mapping
        Of ``job.model``, by name; each tensor is asked for when it is written.
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
    model.config.fastft_task = job.config.task  # for whoever opens the folder alone
    with replacing(folder) as scratch:
        try:
            scratch.mkdir()
            numbers = _Numbers(state, model, folder)
            if merge or not any(edit.write(numbers, model, scratch, kind) for edit in job.edits):
                _write_model(job, numbers, scratch, kind, folder)
                _say_dtype(scratch / "config.json", kind)
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


class _Numbers(Mapping[str, torch.Tensor]):
    """Weights of which those that are trained must be numbers. UserError when one is asked for that is not."""

    def __init__(self, state: Mapping[str, torch.Tensor], model: torch.nn.Module, place: Path):
        self.state, self.place = state, place
        self.trained = {name for name, _ in model.named_parameters()}

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.state[name]
        if name in self.trained and not found.isfinite().all():
            weight_files.refuse(self.place, [name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def _write_model(job: Job, state: Mapping[str, torch.Tensor], folder: Path, kind: torch.dtype, place: Path) -> None:
    """The plain model: what edits changed as it is without them."""
    model = job.model
    for edit in job.edits:
        state = edit.plain(state, model)
    for edit in reversed(job.edits):
        state = edit.merged(state, model, kind)
    plain = _without_weights(model) if job.edits else model
    kept = kept_in_fp32(plain, kind)
    dtypes = {
        name: (torch.float32 if kept and kept.search(name) else kind) if t.is_floating_point() else t.dtype
        for name, t in plain.state_dict(keep_vars=True).items()
    }
    if layout := weight_files.Layout.of(plain):
        model.save_pretrained(folder, state_dict={})  # all but the weights
        weight_files.write(folder, layout, state, dtypes, place)
    else:  # by transformers, all at once
        whole = {name: tensor.detach().to("cpu", dtypes[name]).contiguous() for name, tensor in state.items()}
        model.save_pretrained(folder, state_dict=dict(whole))  # which takes tensors out of the mapping
        _say_dtype(folder / "config.json", kind)  # by which it is read
        _compare(folder, whole, plain, place)


def _without_weights(model: Any) -> Any:
    """A model as the config says it, without edits and without weights."""
    with torch.device("meta"):
        plain = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    if (read_with := getattr(model, "_weight_conversions", None)) is not None:
        plain._weight_conversions = read_with
    return plain


def _say_dtype(config: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into a config.json, where transformers writes that of the model in memory: what
    loads the folder by itself goes by it.
    """

    def said(values: dict) -> dict:
        nested = {k: said(v) for k, v in values.items() if isinstance(v, dict) and "dtype" in v}  # text_config, ...
        return {**values, **nested, "dtype": str(dtype).removeprefix("torch.")}

    config.write_text(json.dumps(said(json.loads(config.read_text())), indent=2, sort_keys=True) + "\n")


def _compare(folder: Path, state: dict[str, torch.Tensor], model: Any, place: Path) -> None:
    """Reload through the model's own class and compare every tensor, bit for bit."""
    loaded, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    reloaded = loaded.state_dict()
    wrong = [name for name, t in state.items() if name not in reloaded or not _same_bits(reloaded[name], t)]
    wrong += sorted(info["missing_keys"])
    if wrong:
        weight_files.differs(place, wrong)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype != b.dtype and a.is_floating_point() and b.is_floating_point():
        # Some classes hold parameters in float32 whatever is asked for (XLNet's mask_emb): the values must be the same.
        a, b = a.double(), b.double()
    if a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
