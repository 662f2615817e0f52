"""Run as ranks by the tests: ``python tests/train/runs.py VERB config.yaml ...``, several runs in one process group.

train C...       train every configuration
gradients OUT C...   one step's gradients and loss, by full parameter name, to OUT/<name of C>.pt (rank 0)
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastft import assemble
from fastft import config as configuration
from fastft.cli.main import leave
from fastft.track import Telemetry
from fastft.train import loop
from fastft.train.heartbeat import Heartbeat
from fastft.train.saver import Saver
from fastft.train.schedule import Schedule
from fastft.train.signals import StopRequest
from fastft.zero import engine


def gradients(out: Path, path: Path) -> None:
    from deepspeed.utils import safe_get_full_grad

    config = configuration.load(path, ["optim.weight_decay=0"])
    job = assemble.start(config)
    assemble.add_data(job, evals=False)
    engine.start_process_group()
    assemble.add_model(job)
    assemble.add_optimizer(job)
    built = engine.build_engine(job.model, job.optimizer, engine.deepspeed_config(config, job.ranks))
    assemble.add_objective(job, built)
    schedule = Schedule.of(config, job.order, job.task.max_length)
    saver = Saver(job, built, schedule, "", StopRequest(), Heartbeat())
    run = loop.Loop(job, built, schedule, saver, Heartbeat())
    run.open(Telemetry(out, main=False))
    built.eval()  # no dropout: the micro-batches of different runs draw different masks
    found = {}

    def keep() -> None:  # instead of the optimizer's step
        for name, p in built.module.named_parameters():
            found[name] = (safe_get_full_grad(p) if config.parallel.zero else p.grad).clone()

    run.stepper._step = keep
    loss = run.optimizer_step(*run.collate_step(0))
    dist.all_reduce(loss)
    if job.ranks.main:
        torch.save({"loss": loss / job.ranks.world, "grads": found}, out / f"{path.stem}.pt")


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
