"""Everything that knows DeepSpeed: the engine, the fused ZeRO step, its checkpoints and their conversion."""
