"""`fastft eval`: the metrics of a model on the configuration's evaluation sets, in this process."""

from pathlib import Path

from fastft.config import Config
from fastft.errors import UserError
from fastft.models import load
from fastft.tasks import TASKS
from fastft.train import engine
from fastft.train.evaluation import evaluate


def evaluate_model(config: Config) -> dict[str, dict[str, float]]:
    """Metrics by set name, for the model in ``config.model.path``.

    Raises
    ------
    UserError
        No evaluation set; a model that was never trained for this task; more than one rank.
    """
    ranks = engine.environment(config)
    if ranks.world > 1:
        raise UserError("fastft eval runs in one process.", "Start it without a launcher.")
    if config.run.offline:
        load.go_offline()
    if not config.data.eval:
        raise UserError("data.eval: no evaluation data given.", "For example: data.eval=test.csv")
    task = TASKS.get(config.task)(config)
    task.load_state(task.state_of_model())
    splits = task.eval_splits()
    model, _ = load.build(config.model, task.auto_class, (), config.run.seed)
    task.check_model(model, ranks.device)
    task.attach(model, ranks.device)
    model.to(ranks.device)
    return {name: evaluate(model, task, split, ranks) for name, split in splits.items()}


def run_config_path(target: str) -> tuple[Path, bool]:
    """A YAML file as it is, or the configuration of a run folder: (path, is a run)."""
    path = Path(target)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(
                f"{path}: not a run folder (no config.yaml).", "Give the run.dir of a run, or a configuration file."
            )
        return path / "config.yaml", True
    return path, False
