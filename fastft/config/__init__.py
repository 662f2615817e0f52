"""The configuration: strict pydantic models, read from one YAML file, every value open to dotted overrides. Imports
no torch.
"""

from fastft.config.base import InputPath, OutputPath, Section
from fastft.config.evaluation import Evaluation
from fastft.config.loading import absolute, dump, inputs, load, load_either, load_run, run_dir, section, validate
from fastft.config.runs import changes, configured, of_trained
from fastft.config.schema import json_schema
from fastft.config.sections import (
    Batch,
    Checkpoint,
    Config,
    Data,
    Loss,
    Model,
    Optim,
    Order,
    Parallel,
    Run,
    Train,
)
from fastft.config.sources import Source

__all__ = [
    "Batch",
    "Checkpoint",
    "Config",
    "Data",
    "Evaluation",
    "InputPath",
    "Loss",
    "Model",
    "Optim",
    "Order",
    "OutputPath",
    "Parallel",
    "Run",
    "Section",
    "Source",
    "Train",
    "absolute",
    "changes",
    "configured",
    "dump",
    "inputs",
    "json_schema",
    "load",
    "load_either",
    "load_run",
    "of_trained",
    "run_dir",
    "section",
    "validate",
]
