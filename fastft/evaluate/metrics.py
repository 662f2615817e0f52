"""`fastft eval`: the metrics of a model on the configuration's evaluation sets, in this process."""

from __future__ import annotations

from fastft import assemble
from fastft.config import Config
from fastft.errors import UserError
from fastft.train.evaluation import evaluate


def evaluate_model(config: Config) -> dict[str, dict[str, float]]:
    """Metrics by set name, for the model in ``config.model.path``.

    Raises
    ------
    UserError
        No evaluation set; a model that was never trained for this task; more than one rank.
    """
    job = assemble.start(config)
    if not job.ranks.alone:
        raise UserError("fastft eval runs in one process.", "Start it without a launcher.")
    if not config.data.eval:
        raise UserError("data.eval: no evaluation data given.", "For example: data.eval=test.csv")
    job.learned = job.task.learned_of_model()
    assemble.add_data(job, train=False)
    assemble.add_model(job, "trained")
    assemble.add_objective(job)
    return {name: evaluate(job, split) for name, split in job.evals.items()}
