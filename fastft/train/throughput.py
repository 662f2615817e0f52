"""Tokens and samples per second."""

import resource
import sys
import time

import torch

from fastft.ranks import Ranks
from fastft.tasks.base import Batch


class Throughput:
    """Tokens and samples per second over all ranks: since the last reading, and over the whole run."""

    def __init__(self):
        self.tokens = self.padded = self.samples = 0
        self.all_tokens = self.all_samples = 0.0
        self.all_seconds = 0.0
        self.since = time.perf_counter()

    def add(self, batch: Batch) -> None:
        self.tokens += batch.tokens
        self.padded += batch.padded
        self.samples += batch.samples

    def read(self, ranks: Ranks) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        counted = ranks.sum([self.tokens, self.padded, self.samples])
        tokens, padded, samples = (n / ranks.sequence_world for n in counted)  # which have the same sequences
        self.all_tokens, self.all_samples, self.all_seconds = (
            self.all_tokens + tokens,
            self.all_samples + samples,
            self.all_seconds + seconds,
        )
        self.tokens = self.padded = self.samples = 0
        return {
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            "padding": 1 - tokens / max(padded, 1),
        }

    def overall(self, ranks: Ranks) -> dict[str, float]:
        seconds = max(self.all_seconds, 1e-9)
        return {
            "train_seconds": self.all_seconds,
            "tokens_per_second": self.all_tokens / seconds,
            "samples_per_second": self.all_samples / seconds,
        }

    def paused(self) -> "_Pause":
        """A context whose time does not count (evaluation, saving)."""
        return _Pause(self)


class _Pause:
    def __init__(self, throughput: Throughput):
        self.throughput = throughput

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc) -> None:
        self.throughput.since += time.perf_counter() - self.start


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
