"""Looking at data, models and runs without training: validate, eval, export, trace, replay, verify-resume."""
