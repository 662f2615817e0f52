"""`fastft validate`: everything that can be wrong before the first step, found without training."""

from __future__ import annotations

from fastft import assemble
from fastft.config import Config
from fastft.train.advice import advice
from fastft.train.footprint import footprint
from fastft.train.record import parameters
from fastft.train.schedule import Schedule
from fastft.zero.settings import deepspeed_config


def validate_run(config: Config) -> dict:
    """Prepare every split, or compare every byte of what is prepared with its hash; build the model and check it
    against the task.

    Returns
    -------
    dict
        ``splits`` (by name: sequences, tokens, fill, counts), ``data`` (sentences on the training set), ``advice``
        (sentences on settings that make little sense), ``footprint`` (bytes, see ``Footprint``), ``steps``,
        ``sequences_per_step``, ``max_length``,
        ``parameters``, ``trained``, ``newly_initialized``.
    """
    job = assemble.start(config)
    assemble.add_data(job)
    assert job.train is not None and job.order is not None
    splits = {"train": job.train, **job.evals}
    for split in splits.values():  # what a run only compares the sizes of
        split.data.verify()
    schedule = Schedule.of(config, job.order, job.task.max_length)
    assemble.add_model(job)
    assemble.add_optimizer(job)
    deepspeed_config(config, job.ranks)
    assemble.add_objective(job)
    report = {name: {"sequences": len(s), **s.totals, "counts": s.data.meta["counts"]} for name, s in splits.items()}
    return {
        "splits": report,
        "data": [*job.task.describe(job.train), *job.order.describe(schedule.positions)],
        "advice": advice(job, schedule),
        "footprint": footprint(job, schedule).as_dict(),
        "steps": schedule.total,
        "sequences_per_step": schedule.size,
        "max_length": job.task.max_length,
        "parameters": parameters(job.model),
        "trained": parameters(job.model, trained=True),
        "newly_initialized": job.initialized,
    }
