"""Run as ranks by the tests: ``python tests/train/runs.py VERB config.yaml ...``, several runs in one process group.

train C...       train every configuration
gradients OUT C...   one step's gradients and loss, by full parameter name, to OUT/<name of C>.pt (rank 0)
shards OUT C...      names of the weights whose shards are not those of a model that was loaded whole, and the first
                     loss, to OUT/<name of C>.json (rank 0)
again OUT C...       the newest checkpoint of the run, resumed and written to OUT as it is
isolated OUT C...    largest change of logits in a document, and smallest beside it, when what is beside it is changed,
                     and the difference from the document alone, to OUT/<name of C>.json (rank 0)
files OUT C...       bytes that the ranks have mapped in files of parallel.offload_dir after a step, to
                     OUT/<name of C>.json (rank 0)
generated OUT C...   what an evaluation generates, tokens by sample, and its metrics, to OUT/<name of C>.json (rank 0)
"""

import gc
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from fastft import assemble, mapped
from fastft import config as configuration
from fastft.cli.main import leave
from fastft.tasks.base import Draw
from fastft.track import Telemetry
from fastft.train import checkpoint, loop
from fastft.train.evaluation import measure
from fastft.train.heartbeat import Heartbeat
from fastft.train.saver import Saver
from fastft.train.schedule import Schedule
from fastft.train.signals import StopRequest
from fastft.train.writer import Writer
from fastft.zero import engine, weights
from fastft.zero.settings import deepspeed_config


def put_together(path: Path):
    """The run and its engine."""
    config = configuration.load(path, ["optim.weight_decay=0"])
    job = assemble.start(config)
    assemble.add_data(job)
    engine.start_process_group()
    job.ranks = job.ranks.with_sequences(config.parallel.sequence).with_group()
    assemble.add_model(job)
    assemble.add_optimizer(job)
    built = engine.build_engine(job.model, job.optimizer, deepspeed_config(config, job.ranks))
    assemble.add_objective(job, built)
    return config, job, built


def generated(out: Path, path: Path) -> None:
    _, job, built = put_together(path)
    metrics, ids = measure(job, job.evals["eval"], built)
    if job.config.task == "sft":
        keys, rows = [one.where for _, one in metrics.asked], metrics.texts
    else:
        keys, rows = ids.tolist(), [row.tolist() for row in metrics.written]
    every = dict(pair for part in job.ranks.gather(list(zip(keys, rows, strict=True))) for pair in part)
    numbers = metrics.finish(job.ranks.gather(metrics.state()))
    if job.ranks.main:
        found = {"tokens": [every[i] for i in sorted(every)], "metrics": numbers, "record": job.record}
        (out / f"{path.stem}.json").write_text(json.dumps(found))


def isolated(out: Path, path: Path) -> None:
    """A document of 7 tokens in the middle of 31: what ranks share of a row begins and ends within documents."""
    with ExitStack() as cleanup:
        run = loop.build(configuration.load(path), cleanup, steps_only=True)
        run.engine.eval()
        tokens = torch.randint(run.job.model.config.vocab_size, (1, 31), generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(n) for n in (12, 7, 12)])[None]
        own = slice(12, 19)

        def logits(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return run.engine(input_ids=tokens, position_ids=positions, use_cache=False).logits

        other = (tokens + 1) % 100
        other[:, own] = tokens[:, own]
        before, after = logits(tokens, positions), logits(other, positions)
        alone = logits(tokens[:, own], positions[:, own])
        changes = (before - after).abs().amax(-1)[0]
        found = {"own": changes[own].max(), "rest": min(changes[:12].min(), changes[19:].min())}
        found["alone"] = (before[:, own] - alone).abs().max()
        if run.job.ranks.main:
            (out / f"{path.stem}.json").write_text(json.dumps({name: float(value) for name, value in found.items()}))


def again(out: Path, path: Path) -> None:
    with ExitStack() as cleanup:
        run = loop.build(configuration.load(path), cleanup, resume=True)
        writer = Writer(run.job.ranks)
        checkpoint.save(run.engine, writer, out, run.step, {}, keep=1)
        writer.wait()
        assert not writer.problem, writer.problem
        run.job.ranks.barrier()


def mappings() -> dict[str, int]:
    """Bytes of every file of parallel.offload_dir that this process has mapped, by its inode."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if mapped.PREFIX in line:
            (begin, _, end), inode = line.split()[0].partition("-"), line.split()[4]
            found[inode] = found.get(inode, 0) + int(end, 16) - int(begin, 16)
    return found


def files(out: Path, path: Path) -> None:
    gc.collect()  # of the run before: its files' numbers are given to others when they are gone
    before = mappings()
    with ExitStack() as cleanup:
        run = loop.build(configuration.load(path), cleanup, steps_only=True)
        run.open(Telemetry(out, main=False))
        next(run.steps())
        every = run.job.ranks.gather(sum(size for inode, size in mappings().items() if inode not in before))
        if run.job.ranks.main:
            (out / f"{path.stem}.json").write_text(json.dumps(sum(every)))


def shards(out: Path, path: Path) -> None:
    """Against the same job without shards: what DeepSpeed's engine would have divided."""
    config = configuration.load(path)
    whole = assemble.start(config)
    assemble.add_data(whole)
    assemble.add_model(whole)
    expected = {name: t.detach().clone() for name, t in whole.model.state_dict().items()}
    parameters = dict(whole.model.named_parameters())
    requires_grad = {name for name, p in parameters.items() if p.requires_grad}
    batch = whole.task.collate(whole.train, [0, 1], Draw.fixed(0, 2))
    with ExitStack() as cleanup:
        run = loop.build(config, cleanup)
        model = run.job.model
        assert all(p.numel() == 0 or p.ds_persist for p in model.parameters()), "a parameter is whole"
        gathered = weights.Gathered(run.engine, run.job.ranks)
        own = {name for name, p in model.named_parameters() if p.requires_grad}
        run.engine.eval()
        one = torch.ones(())
        with torch.no_grad():
            loss = float(run.job.objective.compute_loss(run.engine, batch, one))
        if not run.job.ranks.main:
            gathered.follow()
            return
        wrong = [n for n, t in expected.items() if n not in gathered or not same(gathered[n], t)]
        gathered.close()
    wrong += sorted(own ^ requires_grad) + sorted(set(gathered) ^ set(expected))
    assemble.add_objective(whole)
    whole.model.eval()
    with torch.no_grad():
        plain = float(whole.objective.compute_loss(whole.model, batch, one))
    (out / f"{path.stem}.json").write_text(json.dumps({"wrong": wrong, "loss": loss, "whole": plain}))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def gradients(out: Path, path: Path) -> None:
    from deepspeed.utils import safe_get_full_grad

    config, job, built = put_together(path)
    schedule = Schedule.of(config, job.order, job.task.max_length)
    saver = Saver(job, built, schedule, "", StopRequest(), Heartbeat())
    run = loop.Loop(job, built, schedule, saver, Heartbeat())
    run.open(Telemetry(out, main=False))
    built.eval()  # no dropout: the micro-batches of different runs draw different masks
    found = {}

    def keep() -> None:  # instead of the optimizer's step
        for name, p in [(n, p) for n, p in built.module.named_parameters() if p.requires_grad]:
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
            verbs = {
                "again": again,
                "files": files,
                "gradients": gradients,
                "generated": generated,
                "shards": shards,
                "isolated": isolated,
            }
            verbs[verb](Path(arguments[0]), Path(path))
    dist.destroy_process_group()
    leave(0)
