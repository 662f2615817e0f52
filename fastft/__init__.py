"""fastft: fine-tune pretrained language models at the hardware's limit.

From Python: ``run = fastft.fit("my.yaml")``, then ``run.evaluate()``, ``run.predictor()``, ``run.export(folder)``;
``fastft.Run(folder)`` opens an earlier run. Importing fastft imports nothing else; a name's first use does.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastft.api import Best, Predictions, Run, Summary, fit
    from fastft.config import Config
    from fastft.errors import Interrupted, UserError
    from fastft.evaluate.metrics import Evaluation

__version__ = "0.1.0"

__all__ = [
    "Best",
    "Config",
    "Evaluation",
    "Interrupted",
    "Predictions",
    "Run",
    "Summary",
    "UserError",
    "fit",
]

_FROM = {
    "Config": "fastft.config",
    "Evaluation": "fastft.evaluate.metrics",
    "Interrupted": "fastft.errors",
    "UserError": "fastft.errors",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'fastft' has no attribute {name!r}; it has: {', '.join(__all__)}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_FROM.get(name, "fastft.api")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
