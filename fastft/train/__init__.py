"""The loop, the engine it drives, checkpoints and telemetry."""
