"""ZeRO 3's collectives on a CPU: fastft's rings beside torch's gloo, on ranks of this machine.

    python benchmarks/rings.py [--ranks 2,4] [--rounds N] [--machine NAME] [--quick]

Every rank has one thread. A reduce-scatter takes ranks x `elements` of float32 or bfloat16 to `elements` on each rank,
an all-gather takes them back. Times are rank 0's, between barriers.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parents[1]
SIZES = (10_000, 1_000_000, 25_000_000)
COLUMNS = {
    "what": "s",
    "ranks": "d",
    "elements": ",d",
    "dtype": "s",
    "gloo ms": ".2f",
    "ring ms": ".2f",
    "ratio": ".2f",
}


def rank(out: Path, rounds: int, quick: bool) -> None:
    import torch
    import torch.distributed as dist

    from fastft.zero import rings

    def timed(size: int, dtype: torch.dtype) -> list[dict]:
        whole = torch.full((world * size,), 1.0 / 3).to(dtype)
        part, own = torch.empty(size, dtype=dtype), whole.chunk(world)[me]
        gloo, ring = "gloo ms", "ring ms"
        contenders = {
            "reduce-scatter": {
                gloo: lambda: dist.reduce_scatter_tensor(part, whole),
                ring: lambda: rings.reduce_scatter(own, whole),
            },
            "all-gather": {
                gloo: lambda: dist.all_gather_into_tensor(whole, part),
                ring: lambda: rings.all_gather(whole, own),
            },
        }
        found = []
        for what, both in contenders.items():
            whole.fill_(1.0 / 3)
            times = common.interleave(both, rounds, prepare=dict.fromkeys(both, dist.barrier))
            row = {"what": what, "ranks": world, "elements": size, "dtype": str(dtype).removeprefix("torch.")}
            row |= {name: 1e3 * min(each) for name, each in times.items()}
            found.append(row | {"ratio": common.speedup(times, gloo, ring)})
        return found

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    me, world = dist.get_rank(), dist.get_world_size()
    sizes = SIZES[: 2 if quick else None]
    rows = [row for size in sizes for dtype in (torch.float32, torch.bfloat16) for row in timed(size, dtype)]
    if me == 0:
        out.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, args: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
        s.close()
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--rank", str(out), str(args.rounds), str(int(args.quick))]
        env = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen(command, env=env | {"RANK": str(r)}) for r in range(world)]
        assert not [process for process in ranks if process.wait(900)], "a rank failed"
        return json.loads(out.read_text())


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
        return
    more = lambda parser: parser.add_argument("--ranks", default="2,4")
    args = common.arguments(__doc__.splitlines()[0], rounds=7, more=more)
    rows = [row for world in map(int, args.ranks.split(",")) for row in measure(world, args)]
    common.record("rings", args, rows, COLUMNS)


if __name__ == "__main__":
    main()
