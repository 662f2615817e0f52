"""The parts of a decoder layer on a GPU: attention by document, the element-wise kernels, and whole layers.

    python benchmarks/gpu_layers.py [--out FILE] [--quick]

Attention: forward and backward, beside torch's plain causal attention on the same tokens (what packing without
isolation would cost). Element-wise kernels: the share of the copy's speed, measured in the same run, that the bytes
which they must move come to. Layers: a fused one beside transformers' own, with and without Liger's kernels. A case
that fails is a row with its error. --quick: tiny sizes, on a CPU, to show that it runs.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from fastft.ops import decoder
from fastft.ops.decoder import Documents, attention, decoder_layer, flash

ROOT = Path(__file__).resolve().parents[1]


class Table:
    def __init__(self, out: Path, quick: bool):
        self.out, self.quick, self.failed = out, quick, 0
        self.device = torch.device("cpu" if quick else "cuda")
        self.dtype = torch.bfloat16
        self.copy = float("nan")
        out.parent.mkdir(parents=True, exist_ok=True)
        name = "CPU" if quick else torch.cuda.get_device_name()
        self.run = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__}

    def time(self, call) -> float:
        """Median milliseconds."""
        if not self.quick:
            from triton.testing import do_bench

            return do_bench(call, warmup=20, rep=60, return_mode="median")
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def row(self, part: str, case: str, call, nbytes: float = 0, **more) -> float:
        found = {**self.run, "part": part, "case": case, **more}
        ms = float("nan")
        try:
            call()
            ms = found["ms"] = self.time(call)
            if nbytes:
                found["of_copy"] = nbytes / (ms / 1e3) / self.copy
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"[:300]
            self.failed += 1
        with open(self.out, "a") as file:
            file.write(json.dumps(found) + "\n")
        shown = found.get("error") or f"{ms:9.3f} ms" + (f"  {found['of_copy']:6.1%} of the copy" if nbytes else "")
        print(f"{part:10} {case:60} {shown}", flush=True)
        return ms

    def rand(self, *size: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype).requires_grad_(grad)


def bounds_of(t: Table, rows: int, length: int, document: int) -> torch.Tensor:
    ends = [r * length + at for r in range(rows) for at in range(0, length, document)]
    return torch.tensor([*ends, rows * length], dtype=torch.int32, device=t.device)


def attentions(t: Table) -> None:
    rows, length, long = (2, 32, 8) if t.quick else (8, 2048, 700)
    for heads, groups, dim in ((32, 4, 64), (14, 2, 64), (32, 8, 128)):
        q, k, v = (t.rand(rows, h, length, dim, grad=True) for h in (heads, groups, groups))
        grad = t.rand(rows, heads, length, dim)

        def causal(q=q, k=k, v=v, grad=grad) -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(grad)
            q.grad = k.grad = v.grad = None

        same = {"heads": heads, "groups": groups, "dim": dim}
        plain = t.row("attention", f"{heads}/{groups} x {dim}: torch, causal, whole rows", causal, **same)
        every = [x.detach().repeat_interleave(heads // x.shape[1], 1).requires_grad_() for x in (q, k, v)]

        def repeated(every=every, grad=grad) -> None:
            F.scaled_dot_product_attention(*every, is_causal=True).backward(grad)
            for x in every:
                x.grad = None

        t.row("attention", f"{heads}/{groups} x {dim}: the same, keys repeated before", repeated, **same)
        flat = [x.detach().transpose(1, 2).reshape(rows * length, -1, dim).contiguous() for x in (q, k, v, grad)]
        for document in (length, long):
            where = bounds_of(t, rows, length, document)
            bounds = where, document, dim**-0.5, None

            def by_document(flat=flat, bounds=bounds) -> None:
                out, kept = attention.forward(*flat[:3], *bounds)
                attention.backward(flat[3], *flat[:3], out, kept, *bounds)

            ms = t.row("attention", f"{heads}/{groups} x {dim}: by document, of {document}", by_document, **same)
            print(f"{'':10} {'':60} {ms / plain:9.2f} of torch's causal")
        q = flat[0]
        print(f"{'':10} {'':60} by {attention.kernels(q, groups)}", flush=True)
        where = bounds_of(t, rows, length, length)
        bounds = where, length, dim**-0.5

        def by_torch(flat=flat, bounds=bounds) -> None:
            out, kept = flash.forward(*flat[:3], *bounds)
            flash.backward(flat[3], *flat[:3], out, kept, *bounds)

        if not t.quick:
            t.row(
                "attention",
                f"{heads}/{groups} x {dim}: torch's flash attention by document, of {length}",
                by_torch,
                **same,
            )


def element_wise(t: Table) -> None:
    ops = decoder.kernels(torch.empty(0, device=t.device))
    n, size = (64, 1) if t.quick else (16384, 2)
    for d, f, heads, groups, dim in ((2048, 5632, 32, 4, 64), (896, 4864, 14, 2, 64), (4096, 14336, 32, 8, 128)):
        x, r, w = t.rand(n, d), t.rand(n, d), t.rand(d)
        rstd = ops.rms_forward(x, None, w, 1e-6)[2]
        y, out = torch.empty_like(x), torch.empty_like(x)
        row = n * d * size
        t.row("norm", f"{n} x {d}: forward", lambda x=x, w=w: ops.rms_forward(x, None, w, 1e-6), 2 * row)
        t.row("norm", f"{n} x {d}: forward, residual", lambda x=x, r=r, w=w: ops.rms_forward(x, r, w, 1e-6), 4 * row)
        t.row(
            "norm",
            f"{n} x {d}: backward, residual, norm again",
            lambda x=x, r=r, w=w, rstd=rstd, y=y, out=out: ops.rms_backward(r, x, w, rstd, x, y, out),
            5 * row,
        )
        qkv = t.rand(n, (heads + 2 * groups) * dim)
        cos, sin = t.rand(n, dim), t.rand(n, dim)
        moved = n * (heads + groups) * dim * size
        t.row(
            "rotation",
            f"{n} x {heads}+{groups} x {dim}: forward",
            lambda q=qkv, c=cos, s=sin, h=heads + groups, m=dim: ops.rope_forward(q, c, s, h, m),
            2 * moved,
        )
        grads = [t.rand(n, h, dim) for h in (heads, groups, groups)]
        t.row(
            "rotation",
            f"{n} x {heads}+2x{groups} x {dim}: backward",
            lambda g=grads, c=cos, s=sin: ops.rope_backward(*g, c, s),
            2 * qkv.nbytes,
        )
        gu, da = t.rand(n, 2 * f), t.rand(n, f)
        t.row("gate", f"{n} x {f}: forward", lambda gu=gu: ops.swiglu_forward(*gu.chunk(2, 1)), 3 * da.nbytes)
        t.row(
            "gate",
            f"{n} x {f}: backward",
            lambda gu=gu, da=da: ops.swiglu_backward(*gu.chunk(2, 1), da, in_place=True),
            6 * da.nbytes,
        )


def whole_layers(t: Table) -> None:
    from transformers.models.llama import modeling_llama as llama

    rows, length, document = (2, 32, 8) if t.quick else (8, 2048, 700)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    if t.quick:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = llama.LlamaConfig(**sizes, max_position_embeddings=length)
    config._attn_implementation = "sdpa"
    with t.device:
        layer = llama.LlamaDecoderLayer(config, 0).to(t.dtype)
        rotary = llama.LlamaRotaryEmbedding(config)
    x = t.rand(rows, length, config.hidden_size, grad=True)
    grad = t.rand(rows, length, config.hidden_size)
    position = torch.arange(length, device=t.device)[None]
    rotation = rotary(x, position)

    def clear() -> None:
        x.grad = None
        for p in layer.parameters():
            p.grad = None

    def plain() -> None:
        layer(x, position_ids=position, position_embeddings=rotation).backward(grad)
        clear()

    t.row("layer", "transformers, causal, whole rows", plain)
    from fastft.models.layers import Match, match, weights_of

    found = match(layer)
    assert isinstance(found, Match), found
    for long in (length, document):
        where = Documents(bounds_of(t, rows, length, long), long, rotation[0][0], rotation[1][0])

        def fused(where=where) -> None:
            decoder_layer(x, where, found.shape, weights_of(layer)).backward(grad)
            clear()

        t.row("layer", f"fused, documents of {long}", fused)
    tokens, d, f = rows * length, config.hidden_size, config.intermediate_size
    kv = found.shape.groups * found.shape.dim
    a, w = t.rand(tokens, d), [t.rand(n, m) for n, m in ((d + 2 * kv, d), (d, d), (2 * f, d), (d, f))]
    inner = {d: a, f: t.rand(tokens, f)}

    def products() -> None:
        for weight in w:
            given = inner[weight.shape[1]]
            out = given @ weight.t()
            out @ weight
            out.t() @ given

    t.row("layer", "its matrix products alone", products)


PARTS = {"attention": attentions, "elements": element_wise, "layers": whole_layers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu/layers.jsonl")
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    t = Table(args.out, args.quick)
    n = 1 << (16 if t.quick else 28)
    pair = [torch.randn(n, device=t.device), torch.empty(n, device=t.device)]
    t.copy = 8 * n / (t.row("ceiling", "copy", lambda: pair[1].copy_(pair[0])) / 1e3)
    pair.clear()
    for part in args.parts:
        try:
            PARTS[part](t)
        except Exception as error:
            t.failed += 1
            print(f"{part}: {type(error).__name__}: {error}", flush=True)
    return 1 if t.failed else 0


if __name__ == "__main__":
    sys.exit(main())
