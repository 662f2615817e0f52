"""What a run tells: metrics.jsonl, the terminal, and the trackers that it names (one file each)."""

from fastft.track._console import set_verbosity
from fastft.track._telemetry import Telemetry, finite, read

__all__ = ["Telemetry", "finite", "read", "set_verbosity"]
