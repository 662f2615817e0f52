"""Everything that knows DeepSpeed: the engine, the fused ZeRO step, its checkpoints and their conversion."""

from fastft.zero import _logs

_logs.settle()
