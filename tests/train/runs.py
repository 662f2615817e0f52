"""Run as ranks by the tests: ``python tests/train/runs.py VERB config.yaml ...``, several runs in one process group.

train C...       train every configuration
gradients OUT C...   one step's gradients and loss, by full parameter name, to OUT/<name of C>.pt (rank 0)
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastft import config as configuration
from fastft.cli import leave
from fastft.train import engine, loop
from fastft.train.heartbeat import Heartbeat
from fastft.train.schedule import Schedule


def gradients(out: Path, path: Path) -> None:
    from deepspeed.utils import safe_get_full_grad

    from fastft.models import load
    from fastft.optim import FusedAdamW
    from fastft.optim.groups import parameter_groups
    from fastft.tasks import TASKS

    config = configuration.load(path)
    ranks = engine.environment(config)
    task = TASKS.get(config.task)(config)
    split = task.train_split()
    model, _ = load.build(config.model, task.auto_class, task.new_parameters, config.run.seed, **task.model_overrides())
    task.attach(model, ranks.device)
    optimizer = FusedAdamW(parameter_groups(model, 0.0), lr=0.0)
    engine.start_process_group()
    built = engine.build_engine(model, optimizer, engine.deepspeed_config(config, ranks))
    run = loop._Run(
        config,
        task,
        split,
        {},
        Schedule.of(config, len(split), task.max_length),
        ranks,
        built,
        optimizer,
        "",
        None,
        Heartbeat(),
    )
    built.eval()  # no dropout: the micro-batches of different runs draw different masks
    found = {}

    def keep() -> None:  # instead of the optimizer's step
        for name, p in built.module.named_parameters():
            found[name] = (safe_get_full_grad(p) if config.parallel.zero else p.grad).clone()

    run.stepper._step = keep
    loss = run._optimizer_step(*run._collate_step(0))
    dist.all_reduce(loss)
    if ranks.main:
        torch.save({"loss": loss / ranks.world, "grads": found}, out / f"{path.stem}.pt")


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    if verb == "train":
        for path in arguments:
            loop.train(configuration.load(path))
    else:
        for path in arguments[1:]:
            gradients(Path(arguments[0]), Path(path))
    dist.destroy_process_group()
    leave(0)
