"""`fastft eval`: the metrics of a model on the configuration's evaluation sets, in this process."""

from __future__ import annotations

from pathlib import Path

from fastft import assemble
from fastft import config as configuration
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
    if job.ranks.world > 1:
        raise UserError("fastft eval runs in one process.", "Start it without a launcher.")
    if not config.data.eval:
        raise UserError("data.eval: no evaluation data given.", "For example: data.eval=test.csv")
    job.learned = job.task.learned_of_model()
    assemble.add_data(job, train=False)
    assemble.add_model(job, "trained")
    assemble.add_objective(job)
    return {name: evaluate(job, split) for name, split in job.evals.items()}


def config_of(target: str, overrides: list[str]) -> Config:
    """A YAML file's configuration; of a run folder that of its exported model."""
    if not Path(target).is_dir():
        return configuration.load(target, overrides)
    config = configuration.load_run(target, overrides)
    if any(o.startswith("model.path=") for o in overrides):
        return config
    model = config.model.changed(path=str(Path(target) / "model"), init="pretrained", tokenizer=None)
    return config.changed(model=model)
