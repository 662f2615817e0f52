"""`fastft trace`: which documents a training step learns from, and which steps learn from a document; the order is a
function of the configuration, so nothing needs to have run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from fastft import assemble, track
from fastft import config as configuration
from fastft.assemble import Job
from fastft.config import Config
from fastft.corpus.lookup import places
from fastft.data.mixture import Mixture
from fastft.data.orders.base import Samples
from fastft.data.prepared import Prepared
from fastft.errors import UserError
from fastft.tasks._corpus import CorpusData
from fastft.train import run_folder
from fastft.train.schedule import Schedule


def trace(path: Path, overrides: list[str], step: int) -> list[dict]:
    """The samples of step ``step`` (counted from 1, as in the log), in order: ``sample`` (id), ``documents`` (file and
    line of each) and, of a mixture, ``source``.

    Parameters
    ----------
    path : Path
        A run folder, or a configuration file.

    Raises
    ------
    UserError
        A step that the run does not have; data that is not what this run has learned from.
    """
    config, is_run = configuration.load_either(path, overrides)
    job, samples = samples_of(config, step, path if is_run else None)
    assert job.train is not None
    found: list[dict] = []
    for i in samples.ids.tolist():
        source = {"source": job.order.source_of(i)} if isinstance(job.order, Mixture) else {}
        found.append({"sample": i, **source, "documents": job.task.documents(job.train, i)})
    return found


def steps_of(path: Path, overrides: list[str], document: str) -> dict[str, Any]:
    """The steps that learn from a document: the inverse of ``trace``.

    Parameters
    ----------
    path : Path
        A run folder, whose steps until its last record are looked at, or a configuration file, whose steps all are.
    document : str
        Of a prepared corpus: its id, or source:file:row; of other data: file:row, as ``trace`` gives them. The name
        of the mixture's source may be in front: general:file:row.

    Returns
    -------
    dict
        ``documents`` (where each is that is called so), ``samples`` (in how many sequences they are), ``looked_at``
        (the last step that was) and ``steps``: ``step``, ``sample``, ``epoch`` (how often the sample was taken before),
        ``documents`` (with the tokens of one that is not whole) and, where gradients were not finite and the step
        changed nothing, ``skipped``.

    Raises
    ------
    UserError
        As ``trace`` does; for a document that is not in the training data.
    """
    config, is_run = configuration.load_either(path, overrides)
    job, schedule, records = _opened(config, path if is_run else None)
    split = job.train
    assert split is not None
    part, wanted = _in_part(job, document)
    samples = _samples_with(split.data, wanted)
    if part is not None:
        assert isinstance(job.order, Mixture)
        samples = np.array([sample for sample in samples.tolist() if job.order.source_of(sample) == part], np.int64)
    named = {split.data.origin(d) for d in wanted}
    skipped = {record["step"] for record in records if record["kind"] == "skipped"}
    last = min(max(_steps_taken(records), default=0), schedule.total) if is_run else schedule.total
    found: list[dict] = []
    for step in range(1, last + 1) if len(samples) else ():
        taken = schedule.samples(step - 1)
        for row in np.flatnonzero(np.isin(taken.ids, samples)).tolist():
            sample = int(taken.ids[row])
            said = [where for where in job.task.documents(split, sample) if _whole(where) in named]
            entry = {"step": step, "sample": sample, "epoch": int(taken.epochs[row]), "documents": said}
            found.append(entry | ({"skipped": True} if step in skipped else {}))
    return {"documents": sorted(named), "samples": len(samples), "looked_at": last, "steps": found}


def _steps_taken(records: list[dict]) -> list[int]:
    return [record["step"] for record in records if record["kind"] in ("train", "checkpoint", "end", "interrupted")]


def _whole(where: str) -> str:
    """A place without the tokens or words that are used of it."""
    return re.sub(r" (tokens|words) [0-9]+ to [0-9]+$", "", where)


def _in_part(job: Job, said: str) -> tuple[str | None, list[int]]:
    """Documents that are called so, and the part of the mixture whose name is in front of it (``general:a.txt:3``), as
    ``trace`` shows it; None where none is. UserError for no document.
    """
    assert job.train is not None
    try:
        return None, _documents_called(job.train.data, said)
    except UserError:
        names = job.order.names if isinstance(job.order, Mixture) else []
        if (part := next((name for name in names if said.startswith(f"{name}:")), None)) is None:
            raise
    return part, _documents_called(job.train.data, said[len(part) + 1 :].lstrip())


def _documents_called(data: Prepared, said: str) -> list[int]:
    """Documents of prepared data that are called so. UserError for none."""
    if isinstance(data, CorpusData):
        return data.called(said)
    found: list[int] = []
    for place, row in places(data.meta["origins"], said):
        at = (np.asarray(data["origin_file"]) == place) & (np.asarray(data["origin_row"]) == row)
        found += np.flatnonzero(at).tolist()
    if not found:
        files = ", ".join(data.meta["origins"][:3])
        raise UserError(
            f"the training data has no document {said!r} that is learned from.",
            f"Name it as file:row ({files} ...). Rows that are empty or left out are in no step.",
        )
    return found


def _samples_with(data: Prepared, documents: list[int]) -> np.ndarray:
    """(n,) int64: samples that hold (a part of) one of the documents."""
    if "packs" not in data.columns:
        return np.asarray(documents, np.int64)
    packs = data["packs"]
    pieces = np.flatnonzero(np.isin(data["piece_doc"], documents))
    at = np.flatnonzero(np.isin(packs.values, pieces))
    return np.unique(np.searchsorted(packs.offsets, at, side="right") - 1)


def samples_of(config: Config, step: int, run_dir: Path | None, option: str = "--step") -> tuple[Job, Samples]:
    """The job with its training data, and the samples of a step: of the run in ``run_dir`` as its last start recorded
    it, or of one that would begin. ``option``: what a message calls the step.

    Raises UserError as ``trace`` does.
    """
    job, schedule, _ = _opened(config, run_dir)
    if not 1 <= step <= schedule.total:
        raise UserError(f"{option} {step}: the run has steps 1 to {schedule.total}.")
    return job, schedule.samples(step - 1)


def _opened(config: Config, run_dir: Path | None) -> tuple[Job, Schedule, list[dict]]:
    """The job with its training data, its schedule, and the run's records."""
    job = assemble.start(config)
    assemble.add_data(job, evals=False)
    assert job.train is not None and job.order is not None
    segments: list = []
    records = track.read(run_dir) if run_dir is not None and (run_dir / "metrics.jsonl").exists() else []
    if run_dir is not None and (starts := [r for r in records if r["kind"] == "run"]):
        key = job.train.data.key
        run_folder.check_data(run_dir / "metrics.jsonl", starts[-1].get("data_key", key), key)
        segments = starts[-1].get("segments", starts[-1].get("knots", []))  # as fastft 0.1.0 called them
    return job, Schedule.of(config, job.order, job.task.max_length, segments), records
