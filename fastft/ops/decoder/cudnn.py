"""Attention by document through cuDNN (package nvidia-cudnn-frontend): on a Hopper GPU its kernels are half again as
fast as the flash attention that torch carries, and torch itself chooses them for rows without documents.

A graph is built for so many documents, of so many tokens, of so many in all, and kept: it serves whatever is not
larger, for documents that are not there have length 0. Query, key and value may be parts of one buffer, and so are
their gradients then.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.ops.decoder import flash
from fastft.ops.decoder.flash import heads_side_by_side

log = logging.getLogger(__name__)

SMALLEST = 16, 256  # documents and length of the smallest graph; then powers of two
SPARE = 2  # a graph that is there is used for as few as this part of its documents and length


class Key(NamedTuple):
    """What a graph is built for: at most so many documents, tokens of one, and tokens. Strides are of tokens, in
    elements.
    """

    documents: int
    longest: int
    tokens: int  # 0 in a forward, whose graph does not depend on it
    device: int
    dtype: torch.dtype
    heads: int
    groups: int
    dim: int
    strides: tuple[int, int, int, int]  # of query, key, value, and the result
    scale: float


@functools.cache
def library() -> Any:
    """The package, or None where it cannot be had."""
    try:
        return importlib.import_module("cudnn")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        log.debug("no cudnn: %s", error)
        return None


def refuses(device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int) -> str:
    """Why cuDNN is not used for attention by document; "" where it is: measured against torch's on a small case."""
    if os.environ.get("FASTFT_ATTENTION") == "flash":
        return "FASTFT_ATTENTION=flash"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    return _refuses(device, dtype, heads, groups, dim)


@functools.cache
def _refuses(device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int) -> str:
    if library() is None:
        return "nvidia-cudnn-frontend is not installed"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "it was not measured on this GPU"  # Hopper alone
    if dim % 8 or dim > 128:
        return f"heads of {dim} elements"
    try:
        return _differs(device, dtype, heads, groups, dim)
    except Exception as error:  # whatever this version of it cannot do
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def _differs(device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int) -> str:
    lengths = [130, 1, 61, 320]
    n = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(n, (heads + 2 * groups) * dim, generator=generator).to(device, dtype)
    q, k, v = (part.unflatten(1, (-1, dim)) for part in qkv.split([heads * dim, groups * dim, groups * dim], 1))
    grad = torch.randn(n, heads, dim, generator=generator).to(device, dtype)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    scale = dim**-0.5
    found, kept = forward(q, k, v, ends, max(lengths), scale)
    results = [found, *backward(grad, q, k, v, found, kept, max(lengths), scale)]
    out, rest = flash.forward(q, k, v, ends, max(lengths), scale)
    expected = [out, *flash.backward(grad, q, k, v, out, rest, ends, max(lengths), scale)]
    for name, one, other in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        error = ((one.float() - other.float()).norm() / other.float().norm()).item()
        if not error < 2e-2:
            return f"{name} differs by {error:.2g} from torch's"
    return ""


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `fastft.ops.decoder.attention.forward`, without a window."""
    q, k, v = map(heads_side_by_side, (q, k, v))
    n, heads, dim = q.shape
    out = torch.empty(n, heads, dim, dtype=q.dtype, device=q.device)
    key = _key(q, k, v, out, bounds.numel() - 1, longest, scale)
    tables = _tables(bounds, key)
    _build_ahead(key)
    stats = torch.empty(n, heads, dtype=torch.float32, device=q.device)
    _execute(_forward_graph(key._replace(tokens=0)), q.device, tables, q=q, k=k, v=v, o=out, stats=stats)
    return out, (stats, *tables)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: tuple[Tensor, ...],
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fastft.ops.decoder.attention.backward`, without a window; gradients lie as q, k and v do."""
    stats, *tables = kept
    q, k, v = map(heads_side_by_side, (q, k, v))
    n, heads, dim = q.shape
    groups = k.shape[1]
    if len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1 and q.stride(0) == (heads + 2 * groups) * dim:
        buffer = torch.empty(n, q.stride(0), dtype=q.dtype, device=q.device)
        parts = buffer.split([heads * dim, groups * dim, groups * dim], 1)
        dq, dk, dv = (part.unflatten(1, (-1, dim)) for part in parts)
    else:
        dq, dk, dv = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in (q, k, v))
    key = _key(q, k, v, out, tables[0].numel(), longest, scale)  # documents: those of the forward's graph
    given = {"q": q, "k": k, "v": v, "o": out, "do": grad, "stats": stats, "dq": dq, "dk": dk, "dv": dv}
    _execute(_backward_graph(key), q.device, tuple(tables), **given)
    return dq, dk, dv


def _key(q: Tensor, k: Tensor, v: Tensor, out: Tensor, documents: int, longest: int, scale: float) -> Key:
    strides = q.stride(0), k.stride(0), v.stride(0), out.stride(0)
    wanted = Key(
        max(SMALLEST[0], 1 << (documents - 1).bit_length()),
        max(SMALLEST[1], 1 << (longest - 1).bit_length()),
        _rounded(q.shape[0]),
        q.device.index or 0,
        q.dtype,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        strides,
        scale,
    )
    return _fitting(wanted)


def _rounded(tokens: int) -> int:
    """Up to one of four sizes between two powers of two, all multiples of 64."""
    step = max(64, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step


_known: dict[Key, set[tuple[int, int, int]]] = {}  # by kind (a key without sizes): the sizes that have graphs


def _fitting(wanted: Key) -> Key:
    """The smallest key that has a graph and serves as ``wanted``; else ``wanted``, which has one from now on."""
    kind = wanted._replace(documents=0, longest=0, tokens=0)
    known = _known.setdefault(kind, set())
    fits = [
        size
        for size in known
        if wanted.documents <= size[0] <= SPARE * wanted.documents
        and wanted.longest <= size[1] <= SPARE * wanted.longest
        and wanted.tokens <= size[2]
    ]
    if not fits:
        known.add(wanted[:3])
        return wanted
    documents, longest, tokens = min(fits)
    return wanted._replace(documents=documents, longest=longest, tokens=tokens)


def _tables(bounds: Tensor, key: Key) -> tuple[Tensor, ...]:
    """Lengths (documents,) int32, and where documents begin in query, key, value, result and stats, in elements
    (documents + 1,) int64. The same for all layers: kept with the bounds.
    """
    kept = getattr(bounds, "_fastft_tables", None)
    kind = (key.documents, key.heads, *key.strides)
    if kept is not None and kept[0] == kind:
        return kept[1]
    begin = bounds.long()
    missing = key.documents + 1 - begin.numel()
    if missing:
        begin = torch.cat([begin, begin[-1:].expand(missing)])
    lengths = begin.diff().to(torch.int32)
    offsets = {stride: begin * stride for stride in {*key.strides, key.heads}}
    tables = (lengths, *(offsets[stride] for stride in (*key.strides, key.heads)))
    bounds._fastft_tables = (kind, tables)  # type: ignore[attr-defined]
    return tables


TABLES = ("lengths", "q_at", "k_at", "v_at", "o_at", "stats_at")


@functools.cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return library().create_handle()


class Built(NamedTuple):
    """A graph, the numbers of its tensors by name, and the bytes that it works in."""

    graph: Any
    uids: dict[str, int]
    size: int


def _execute(built: Built, device: torch.device, tables: tuple[Tensor, ...], **given: Tensor) -> None:
    handle = _handle(device.index or 0)
    library().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    given |= zip(TABLES, tables, strict=True)
    pointers = {built.uids[name]: tensor.data_ptr() for name, tensor in given.items()}
    workspace = torch.empty(max(built.size, 1), dtype=torch.uint8, device=device)
    built.graph.execute(pointers, workspace.data_ptr(), handle=handle)


class _Builder:
    """A graph under way, its tensors by name."""

    def __init__(self, key: Key):
        self.cudnn, self.key = library(), key
        kinds = self.cudnn.data_type
        self.io = kinds.BFLOAT16 if key.dtype == torch.bfloat16 else kinds.HALF
        self.graph = self.cudnn.pygraph(
            io_data_type=self.io,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            sm_version=90,
            handle=_handle(key.device),
        )
        self.uids: dict[str, int] = {}
        b = key.documents
        self.lengths = self.add("lengths", (b, 1, 1, 1), (1, 1, 1, 1), kinds.INT32)
        self.at = {
            name: self.add(f"{name}_at", (b + 1, 1, 1, 1), (1, 1, 1, 1), kinds.INT64)
            for name in ("q", "k", "v", "o", "stats")
        }

    def add(self, name: str, dim: tuple, stride: tuple, kind: Any) -> Any:
        self.uids[name] = len(self.uids) + 1
        return self.graph.tensor(name=name, dim=list(dim), stride=list(stride), data_type=kind, uid=self.uids[name])

    def layout(self, part: str) -> tuple[tuple, tuple]:
        """Dimensions (documents, heads, longest, dim) and strides of query, key, value or result."""
        key = self.key
        heads = key.heads if part in ("q", "o") else key.groups
        stride = key.strides[("q", "k", "v", "o").index(part)]
        return (key.documents, heads, key.longest, key.dim), (key.longest * stride, key.dim, stride, 1)

    def ragged(self, name: str, part: str) -> Any:
        tensor = self.add(name, *self.layout(part), self.io)
        tensor.set_ragged_offset(self.at[part])
        return tensor

    def result(self, tensor: Any, name: str, part: str) -> None:
        dim, stride = self.layout(part)
        self.uids[name] = len(self.uids) + 1
        tensor.set_output(True).set_dim(list(dim)).set_stride(list(stride)).set_uid(self.uids[name])
        tensor.set_data_type(self.io)
        tensor.set_ragged_offset(self.at[part])

    @property
    def stats_layout(self) -> tuple[tuple, tuple]:
        key = self.key
        return (key.documents, key.heads, key.longest, 1), (key.longest * key.heads, 1, key.heads, 1)

    @property
    def mask(self) -> dict[str, Any]:
        return {
            "use_padding_mask": True,
            "seq_len_q": self.lengths,
            "seq_len_kv": self.lengths,
            "diagonal_alignment": self.cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }

    def built(self) -> Built:
        graph, modes, begun = self.graph, self.cudnn.heur_mode, time.perf_counter()
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([modes.A, modes.FALLBACK])
        graph.check_support()
        graph.build_plans()
        seconds, key = time.perf_counter() - begun, self.key
        log.info("cuDNN's graph for %d documents of %d tokens, %d in all: %.2f s", *key[:3], seconds)
        return Built(graph, self.uids, graph.get_workspace_size())


def _build_ahead(key: Key) -> None:
    """With the first graphs for documents of a length those for twice as many: a graph takes a third of a second, which
    is better spent in the first step than in the middle of a run.
    """
    known = _known[key._replace(documents=0, longest=0, tokens=0)]
    if sum(longest == key.longest for _, longest, _ in known) == 1:
        twice = key._replace(documents=2 * key.documents)
        known.add(twice[:3])
        for one in (key, twice):
            _forward_graph(one._replace(tokens=0))
            _backward_graph(one)


@functools.cache
def _forward_graph(key: Key) -> Built:
    return _forward_builder(key).built()


def _forward_builder(key: Key) -> _Builder:
    builder = _Builder(key)
    q, k, v = (builder.ragged(name, name) for name in ("q", "k", "v"))
    o, stats = builder.graph.sdpa(
        name="attention", q=q, k=k, v=v, generate_stats=True, attn_scale=key.scale, **builder.mask
    )
    builder.result(o, "o", "o")
    dim, stride = builder.stats_layout
    builder.uids["stats"] = len(builder.uids) + 1
    stats.set_output(True).set_dim(list(dim)).set_stride(list(stride)).set_uid(builder.uids["stats"])
    stats.set_data_type(builder.cudnn.data_type.FLOAT)
    stats.set_ragged_offset(builder.at["stats"])
    return builder


@functools.cache
def _backward_graph(key: Key) -> Built:
    return _backward_builder(key).built()


def _backward_builder(key: Key) -> _Builder:
    builder = _Builder(key)
    q, k, v, o = (builder.ragged(name, name) for name in ("q", "k", "v", "o"))
    do = builder.ragged("do", "o")
    stats = builder.add("stats", *builder.stats_layout, builder.cudnn.data_type.FLOAT)
    stats.set_ragged_offset(builder.at["stats"])
    dq, dk, dv = builder.graph.sdpa_backward(
        name="attention_backward", q=q, k=k, v=v, o=o, dO=do, stats=stats, attn_scale=key.scale,
        max_total_seq_len_q=key.tokens, max_total_seq_len_kv=key.tokens, **builder.mask,
    )  # fmt: skip
    for tensor, part in ((dq, "q"), (dk, "k"), (dv, "v")):
        builder.result(tensor, f"d{part}", part)
    return builder
