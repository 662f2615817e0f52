"""DeepSpeed's optimizer step under ZeRO 1, 2 and 3 on the CPU: with the fused seam, and without it.

fused       fastft's one pass (fastft/optim/zero_step.py)
unfused     DeepSpeed's own step with FusedAdamW as its client optimizer
deepspeed   DeepSpeed's own step with its DeepSpeedCPUAdam
torch       DeepSpeed's own step with torch.optim.AdamW(fused=True)

One rank, bf16 parameters with fp32 master weights, gradient clipping. Only engine.step() is timed: gradient norm,
overflow check where the contender makes one, clipping, Adam and the weights' store. First the bf16 weights after 3
steps are compared: fused and unfused bit for bit, the others within 2 units in the last place of the largest. The peers
run DeepSpeed's defaults, which spare them the overflow check.

With --offload, parallel.offload for ours and the same settings for the others: results/offload.md.

With --offload-dir, the fused step with state in files of that folder (parallel.offload_dir) beside the same with state
in memory: results/offload_dir.md. The weights after 3 steps are equal bit for bit; then both are timed in turns in one
process, and each is built and stepped in a process of its own, whose anonymous memory (RssAnon, which what is mapped
from files is not in) is read every 5 ms: its peak while the engine is made and while it steps, less what the process
took before there was a model. There is room for the files in memory here: a disk that has to be waited for is slower.

    python benchmarks/zero_step.py [--machine NAME] [--parameters MILLIONS ...] [--offload optimizer]
    python benchmarks/zero_step.py --offload-dir FOLDER [--parameters MILLIONS ...]
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import json
import subprocess
import sys
from pathlib import Path

import common
import torch
from large import Sampler

from fastft.cli import leave
from fastft.config import Parallel, validate
from fastft.optim import FusedAdamW
from fastft.ranks import environment
from fastft.zero import engine
from fastft.zero.settings import deepspeed_config

OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
WIDTH, VOCABULARY = 1024, 32000
COLUMNS = {
    "stage": "d",
    "parameters": ",d",
    "fused ms": ".1f",
    "unfused ms": ".1f",
    "deepspeed ms": ".1f",
    "torch ms": ".1f",
    "fused GB/s": ".1f",
    "of unfused": ".2f",
    "of deepspeed": ".2f",
    "of torch": ".2f",
    "of the best": ".2f",
    "weights differ": ".1e",
}


class Net(torch.nn.Module):
    """Shapes of a decoder (an embedding and blocks of four matrices);
    the forward touches every parameter for little work.
    """

    def __init__(self, millions: int):
        super().__init__()
        blocks = max(1, round((millions * 1e6 - VOCABULARY * WIDTH) / (12 * WIDTH * WIDTH)))
        shapes = [(WIDTH, VOCABULARY)] + [
            (WIDTH, 3 * WIDTH),
            (WIDTH, WIDTH),
            (WIDTH, 4 * WIDTH),
            (WIDTH, 4 * WIDTH),
        ] * blocks
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*shape) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (1, WIDTH)
        return torch.cat([layer(x) for layer in self.layers], dim=1).float().square().mean()


class Contender:
    """One engine; ``backward`` fills its gradients, ``step`` is what is timed."""

    def __init__(self, name: str, stage: int, millions: int, offload: str | None, folder: str | None = None):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        torch.manual_seed(0)
        net = Net(millions).bfloat16()
        ours = name in ("fused", "unfused")
        make = FusedAdamW if ours else DeepSpeedCPUAdam if name == "deepspeed" else torch.optim.AdamW
        optimizer = make(net.parameters(), **OPTIONS, **({"fused": True} if name == "torch" else {}))
        config = validate(
            {
                "task": "causal_lm",
                "model": {"path": "-", "dtype": "bf16"},
                "parallel": {"zero": stage, "offload": offload},
                "run": {"device": "cpu"},
            }
        )
        ranks = environment(config)
        engine.start_process_group()
        settings = deepspeed_config(config, ranks)
        if ours:
            parallel = Parallel(zero=stage, fused_step=name == "fused", offload=offload, offload_dir=folder)
            self.engine = engine.build_engine(net, optimizer, settings, parallel)
            assert name == "unfused" or self.engine.fastft_step == "fused", self.engine.fastft_step
        else:
            import deepspeed

            settings["bf16"] = {"enabled": True}
            self.engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)

    def backward(self) -> None:
        x = torch.linspace(-1, 1, WIDTH, dtype=torch.bfloat16)[None]
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(self.engine(x))

    def step(self) -> None:
        self.engine.step()

    def weights(self) -> torch.Tensor:
        import deepspeed

        parts = []
        for p in self.engine.module.parameters():
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                parts.append(p.detach().reshape(-1).clone())
        return torch.cat(parts)


def compare(contenders: dict[str, Contender]) -> float:
    """Largest difference to the unfused weights after 3 steps; stops the benchmark where a result is wrong."""
    for _ in range(3):
        for c in contenders.values():
            c.backward()
            c.step()
    truth = contenders["unfused"].weights()
    if not torch.equal(contenders["fused"].weights(), truth):
        raise SystemExit("the fused step's weights are not the unfused one's")
    worst = max((contenders[n].weights().float() - truth.float()).abs().max().item() for n in ("deepspeed", "torch"))
    if not worst <= 2 * truth.abs().max().item() / 128:
        raise SystemExit(f"a peer's weights differ by {worst:.3g}; not timed")
    return worst


def measure(stage: int, millions: int, rounds: int, offload: str | None) -> dict:
    names = ("fused", "unfused", "deepspeed", "torch")
    contenders = {name: Contender(name, stage, millions, offload) for name in names}
    row = {
        "stage": stage,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in contenders["fused"].engine.module.parameters()),
    }
    row["weights differ"] = compare(contenders)
    times = common.interleave(
        {n: c.step for n, c in contenders.items()}, rounds, prepare={n: c.backward for n, c in contenders.items()}
    )
    for name, seconds in times.items():
        row[f"{name} ms"] = min(seconds) * 1e3
        if name != "fused":
            row[f"of {name}"] = 1 / common.speedup(times, name, "fused")
    row["of the best"] = max(row[f"of {name}"] for name in times if name != "fused")
    row["fused GB/s"] = 28 * row["parameters"] / min(times["fused"]) / 1e9
    return row


def in_files(stage: int, millions: int, rounds: int, offload: str, folder: str) -> dict:
    """The step with state in files, beside that with state in memory."""
    contenders = {
        "files": Contender("fused", stage, millions, offload, folder),
        "memory": Contender("fused", stage, millions, offload),
    }
    for _ in range(3):
        for c in contenders.values():
            c.backward()
            c.step()
    if not torch.equal(*(c.weights() for c in contenders.values())):
        raise SystemExit("the weights with state in files are not those with state in memory")
    times = common.interleave(
        {n: c.step for n, c in contenders.items()}, rounds, prepare={n: c.backward for n, c in contenders.items()}
    )
    parameters = contenders["memory"].engine.module.parameters()
    row = {"offload": offload, "stage": stage, "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters)}
    row |= {f"{name} ms": min(seconds) * 1e3 for name, seconds in times.items()}
    return row | {"of memory": 1 / common.speedup(times, "memory", "files")}


def memory(stage: int, millions: int, offload: str, folder: str | None) -> dict[str, float]:
    """MB of anonymous memory while the engine is made, and in its steps."""
    before, sampler = common.status("RssAnon:"), Sampler()
    sampler.start()
    sampler.enter("made")
    contender = Contender("fused", stage, millions, offload, folder)
    sampler.enter("steps")
    for _ in range(3):
        contender.backward()
        contender.step()
    sampler.enter("end")
    return {phase: (sampler.peaks[phase] - before) / 1e6 for phase in ("made", "steps")}


FILES = {"offload": "s", "stage": "d", "parameters": ",d", "files ms": ".1f", "memory ms": ".1f", "of memory": ".2f"}
FILES |= {f"{where} MB, {phase}": ",.0f" for where in ("files", "memory") for phase in ("made", "steps")}


def measure_files(args) -> None:
    def child(*given) -> dict:
        command = [sys.executable, __file__, *map(str, given)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(said.splitlines()[-1])

    rows, folder = [], str(Path(args.offload_dir).resolve())
    for millions in [40] if args.quick else args.parameters:
        for stage, offload in ((1, "optimizer"), (3, "optimizer"), (3, "parameters")):
            row = child("--files", stage, millions, args.rounds, offload, folder)
            for where, place in (("files", folder), ("memory", "")):
                taken = child("--memory", stage, millions, offload, place)
                row |= {f"{where} MB, {phase}": size for phase, size in taken.items()}
            rows.append(row)
    common.record("offload_dir", args, rows, FILES)


def main() -> None:
    if sys.argv[1:2] in (["--files"], ["--memory"]):
        *numbers, offload, folder = sys.argv[2:]
        given = (*map(int, numbers), offload)
        print(json.dumps(in_files(*given, folder) if sys.argv[1] == "--files" else memory(*given, folder or None)))
        engine.stop_process_group()
        leave(0)
    if sys.argv[1:2] == ["--measure"]:  # in a process of its own: DeepSpeed's engines do not give their memory back
        print(json.dumps(measure(*map(int, sys.argv[2:5]), sys.argv[5] or None)))
        engine.stop_process_group()
        leave(0)  # gloo's threads may abort an interpreter that shuts down

    def more(parser):
        parser.add_argument("--parameters", type=int, nargs="+", default=[100, 200])
        parser.add_argument("--offload", choices=["optimizer", "parameters"])
        parser.add_argument("--offload-dir", metavar="FOLDER", help="for the files: 16 bytes a parameter")

    args = common.arguments(__doc__.splitlines()[0], more=more)
    if args.offload_dir:
        measure_files(args)
        return
    rows = []
    for millions in [40] if args.quick else args.parameters:
        for stage in (3,) if args.offload == "parameters" else (1, 2, 3):
            numbers = map(str, (stage, millions, args.rounds))
            command = [sys.executable, __file__, "--measure", *numbers, args.offload or ""]
            rows.append(
                json.loads(
                    subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
                )
            )
    if args.offload:
        rows = [{"offload": args.offload, **row} for row in rows]
        common.record("offload", args, rows, {"offload": "s", **COLUMNS})
    else:
        common.record("zero_step", args, rows, COLUMNS)


if __name__ == "__main__":
    main()
