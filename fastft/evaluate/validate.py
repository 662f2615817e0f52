"""`fastft validate`: everything that can be wrong before the first step, found without training."""

from fastft.config import Config
from fastft.data import prepared
from fastft.models import load
from fastft.tasks import TASKS
from fastft.train import engine
from fastft.train.schedule import Schedule


def validate_run(config: Config) -> dict:
    """Prepare every split, or compare every byte of what is prepared with its hash; build the model and check it against the task.

    Returns
    -------
    dict
        ``splits`` (by name: sequences, tokens, fill, counts), ``steps``, ``sequences_per_step``, ``max_length``, ``parameters``,
        ``drawn_anew``.
    """
    ranks = engine.environment(config)
    if config.run.offline:
        load.go_offline()
    task = TASKS.get(config.task)(config)
    task.check_best_by()
    train = task.train_split()
    splits = {"train": train, **task.eval_splits()}
    for split in splits.values():  # what a run only compares the sizes of
        prepared.verify(split.data.folder)
    schedule = Schedule.of(config, len(train), task.max_length)
    model, drawn = load.build(
        config.model, task.auto_class, task.new_parameters, config.run.seed, **task.model_overrides()
    )
    task.check_model(model, ranks.device)
    task.attach(model, ranks.device)
    load.freeze(model, config.model.freeze)
    engine.deepspeed_config(config, ranks)
    report = {name: {"sequences": len(s), **s.totals, "counts": s.data.meta["counts"]} for name, s in splits.items()}
    return {
        "splits": report,
        "steps": schedule.total,
        "sequences_per_step": schedule.size,
        "max_length": task.max_length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "drawn_anew": drawn,
    }
