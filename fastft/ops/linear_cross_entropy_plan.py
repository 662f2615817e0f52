"""How many rows of logits linear_cross_entropy takes at a time.

More rows make better GEMMs and fewer passes over the sum of dW; fewer rows need less memory. On the CPU a budget of
bytes decides. On CUDA a model of the time does, among the ways that fit into memory.
"""

import functools
from dataclasses import dataclass

# Bytes of logits per chunk. CPU: 1.3k rows of 50k bfloat16 classes; GEMMs gain nothing from more (768 x 50257, 2 cores:
# 134 Gflop/s at 256 rows and at 2048), and each chunk costs one pass over dW.
CPU_BYTES = 128 << 20
# CUDA: at most for logits and for what a float32 sum of dW takes more than dW itself. torch's own path needs 6 GiB for
# 8192 x 128256 logits.
CUDA_BYTES = 5 << 29
# Of a budget that nobody asked for: with 131 rows (256k classes in 64 MiB) the pass over dW took a fifth of its GEMM.
LEAST_ROWS = 512
# A GiB more is taken where it makes the whole at least this share faster: 8192 x 4096 x 128256 then parks half of its
# rows (1.0 GiB, 5 % slower by the model than 2.0 GiB), 8192 x 896 x 151936 takes all rows at once (2.3 GiB instead of
# 1.4, 8 % faster).
WORTH = 0.06

# The model's GPU: an H100's large bfloat16 GEMM and its copy. Another GPU has other figures; what counts is their
# quotient, 230 flops per byte here, 165 on an H200 and on an A100.
FLOPS, BANDWIDTH = 650e12, 2.8e12  # per second
LAUNCH = 2e-6  # seconds between kernels that wait in a queue
# Outputs of one block of a GEMM, and what share of the peak it reaches. Blocks run in waves of one per multiprocessor;
# an incomplete last wave takes as long as a full one: 2048 rows x 2304 are 144 tiles, 1.1 waves on 132.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.8))
SPLITS = (1, 2, 4)  # of the inner dimension, their parts added up in float32


@dataclass(frozen=True)
class Plan:
    """Rows per chunk; and, where `parked` is not 0, so many first rows whose gradient waits in dW's own memory until
    the last chunk is there (see linear_cross_entropy_sums.Parked).
    """

    size: int
    parked: int = 0

    def chunks(self, rows: int) -> list[slice]:
        """The chunks of so many rows, in order."""
        starts = [*range(0, self.parked, self.size), *range(self.parked, rows, self.size)]
        return [slice(a, b) for a, b in zip(starts, [*starts, rows][1:], strict=True)]


def by_bytes(rows: int, vocab: int, itemsize: int, chunk_bytes: int | None, sum_bytes: int) -> Plan:
    """Chunks within the budget, all but the last of about the same size (oneDNN compiles code per size).

    sum_bytes: of the float32 sum that several chunks need for dW and one chunk does not. Where all logits take no more
    than a chunk and that sum (bfloat16: up to some 2 H rows), one chunk is both smaller and faster, and it is taken
    unless chunk_bytes forbids it.
    """
    if chunk_bytes is None:
        most = max(CPU_BYTES // (vocab * itemsize), LEAST_ROWS)
        if rows * vocab * itemsize <= CPU_BYTES + sum_bytes:
            most = max(most, rows)
    else:
        most = max(chunk_bytes // (vocab * itemsize), 1)
    chunks = max(-(-rows // most), 1)
    even = -(-max(rows, 1) // chunks)
    return Plan(min(-(-even // 16) * 16, most))


@functools.lru_cache(maxsize=256)
def by_model(
    rows: int, vocab: int, hidden: int, itemsize: int, needs_hidden: bool, needs_weight: bool, multiprocessors: int
) -> Plan:
    """Of the ways that need at most CUDA_BYTES, or have chunks of LEAST_ROWS, the fastest, memory weighed by WORTH.

    vocab: columns of the logits' array, padding included. itemsize: of the weight; 4 needs no other sum.
    """
    row_bytes = vocab * itemsize
    sum_bytes = 4 * vocab * hidden if needs_weight and itemsize == 2 else 0
    more = sum_bytes // 2  # what the sum takes more than the gradient
    model = _Model(vocab, hidden, needs_hidden, needs_weight, sum_bytes, multiprocessors)
    ways: list[tuple[int, Plan]] = []  # bytes
    if rows <= LEAST_ROWS or rows * row_bytes <= CUDA_BYTES:
        ways.append((rows * row_bytes, Plan(max(rows, 1))))
    most = max((CUDA_BYTES - more) // row_bytes // 128 * 128, LEAST_ROWS)
    fewest = max(-(-rows // most), 2)
    for chunks in range(fewest, fewest + 6):
        size = _whole_tiles(-(-rows // chunks))
        if size < rows and (size >= LEAST_ROWS or chunks == fewest):
            ways.append((size * row_bytes + more, Plan(size)))
    for chunks in (2, 3, 4) if sum_bytes else ():
        size = _whole_tiles(max(-(-rows // chunks), rows - hidden))
        if LEAST_ROWS <= size < rows and size * row_bytes <= CUDA_BYTES:
            ways.append((size * row_bytes, Plan(size, parked=rows - size)))
    return min(ways, key=lambda way: model.seconds(rows, way[1]) * (1 + WORTH * way[0] / 2**30))[1]


def block_of_classes(hidden: int, multiprocessors: int) -> int:
    """Classes of dW that Parked computes at a time: two full waves, whose float32 sums (35 MB) mostly stay in the
    L2 cache.
    """
    return max(2 * multiprocessors * 128 * 256 // hidden // 256, 1) * 256


def _whole_tiles(rows: int) -> int:
    return -(-rows // 128) * 128


@dataclass(frozen=True)
class _Model:
    vocab: int
    hidden: int
    needs_hidden: bool
    needs_weight: bool
    sum_bytes: int
    multiprocessors: int

    def seconds(self, rows: int, plan: Plan) -> float:
        """Of logits, loss and gradients of all rows."""
        chunks = [part.stop - part.start for part in plan.chunks(rows)]
        total = sum(self._chunk(n) for n in chunks)
        if not self.needs_weight:
            return total
        dw = 2 * self.vocab * self.hidden  # bytes in bfloat16
        if plan.parked:  # one more pass over the logits that wait; the blocks' sums mostly stay in the L2 cache
            classes = block_of_classes(self.hidden, self.multiprocessors)
            blocks = -(-self.vocab // classes)
            total += blocks * sum(self._gemm(classes, self.hidden, n) for n in (plan.parked, rows - plan.parked))
            return total + (4 * plan.parked * self.vocab + dw) / BANDWIDTH + 2 * blocks * LAUNCH
        total += sum(self._gemm(self.vocab, self.hidden, n) for n in chunks)
        if self.sum_bytes and len(chunks) > 1:  # half of its traffic hides behind the GEMMs; then it is rounded
            total += (len(chunks) - 0.5 + 1.5) * self.sum_bytes / BANDWIDTH
        return total

    def _chunk(self, rows: int) -> float:
        """Logits, dX, and the loss: which reads and writes each logit once, however many rows there are (to keep them
        in the L2 cache they would have to be 200, and dW would then be summed 40 times).
        """
        seconds = self._gemm(rows, self.vocab, self.hidden) + 4 * rows * self.vocab / BANDWIDTH + 3 * LAUNCH
        return seconds + (self._gemm(rows, self.hidden, self.vocab) if self.needs_hidden else 0.0)

    def _gemm(self, m: int, n: int, k: int) -> float:
        """(m, k) x (k, n): whole waves of the best tile, plus the partial sums where k is split."""
        found = []
        for height, width, share in TILES:
            tiles = -(-m // height) * -(-n // width)
            for parts in SPLITS:
                waves = -(-tiles * parts // self.multiprocessors)
                busy = waves * self.multiprocessors * height * width * 2 * (k / parts) / (FLOPS * share)
                found.append(busy + (8 * parts * m * n / BANDWIDTH if parts > 1 else 0.0))
        return LAUNCH + min(found)
