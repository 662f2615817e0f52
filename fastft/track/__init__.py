"""What a run tells: metrics.jsonl, the terminal, and the trackers that it names (one file each)."""

from fastft.track._telemetry import Telemetry, read

__all__ = ["Telemetry", "read"]
