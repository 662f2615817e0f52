"""fastft from Python, in scripts and notebooks: ``fastft.fit(config)``, ``fastft.Run(folder)`` and what they give.

The names that users need are attributes of ``fastft`` itself, which imports this file when one of them is first used.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fastft import config as configuration
from fastft import track
from fastft.config import Config
from fastft.errors import UserError
from fastft.launch import protocol
from fastft.lazy import before_imports

if TYPE_CHECKING:
    from fastft.evaluate.metrics import Evaluation

before_imports()

PLACE = (*protocol.PLACE, *protocol.LOCAL)  # what says to torch.distributed where a process stands


@dataclass(frozen=True)
class Best:
    """The best checkpoint by ``checkpoint.best_by``: its step, and the metric's name (``test.accuracy``) and value."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes
    ----------
    step : int
        Optimizer steps taken.
    eval : dict
        Metrics of the exported model: set name -> metric name -> value.
    exported_step : int
        The step whose weights are in ``model``.
    model : str
        The exported Hugging Face folder.
    best : Best or None
        None: the run has no ``checkpoint.best_by``.
    stopped : str or None
        Why it ended before its last step.
    train_seconds, tokens_per_second, samples_per_second : float
        Over the steps of the last start, without evaluations and saves.
    """

    step: int
    eval: dict[str, dict[str, float]]
    exported_step: int
    model: str
    best: Best | None
    stopped: str | None
    train_seconds: float
    tokens_per_second: float
    samples_per_second: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Summary:
        """From the record of a run's end, or what training returns."""
        values: dict[str, Any] = {f.name: record.get(f.name) for f in fields(cls)}
        values["exported_step"] = record.get("exported_step", record["step"])  # fastft 0.1.0 always took the last
        best = record.get("best")
        return cls(**{**values, "best": Best(best["step"], best["metric"], best["value"]) if best else None})


class Predictions:
    """Predictions of a trained model, by a call.

    Attributes
    ----------
    fields : tuple of str
        What a row may hold: text, text_pair, tokens, ...; a text alone is the first.
    """

    def __init__(self, model: str, options: Mapping[str, Any]):
        from fastft.evaluate.predict import predictor

        self._predictor = predictor(model, dict(options))
        self.fields = tuple(name for name, column in self._predictor.fields.items() if column is not None)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is iterable, too, but taken as the text that it is
        self, inputs: str | Mapping[str, Any], batch_size: int = ..., top_k: int | None = ...
    ) -> dict[str, Any]: ...

    @overload
    def __call__(
        self, inputs: Iterable[str | Mapping[str, Any]], batch_size: int = ..., top_k: int | None = ...
    ) -> list[dict[str, Any]]: ...

    def __call__(self, inputs, batch_size: int = 32, top_k: int | None = None):
        """The prediction for a text or a row, or a list of them for many, in order.

        Parameters
        ----------
        inputs : str, mapping, or an iterable of either
            A mapping has the keys that ``fields`` names, and may have more.
        top_k : int, optional
            Keep so many of the scores, the highest.

        Raises
        ------
        UserError
            A row that lacks a field or is empty, by its number (from 0).
        """
        from fastft.evaluate.predict import predict

        single = isinstance(inputs, (str, Mapping)) or not isinstance(inputs, Iterable)
        rows = [self._row(i, one) for i, one in enumerate([inputs] if single else inputs)]
        found = list(predict(self._predictor, rows, batch_size, top_k))
        return found[0] if single else found

    def _row(self, i: int, one: Any) -> tuple[str, dict[str, Any]]:
        first, *_ = self.fields
        if isinstance(one, str) or (isinstance(one, list) and first != "text"):
            return f"row {i}", {first: one}
        if not isinstance(one, Mapping):
            raise UserError(
                f"row {i}: {one!r} is a {type(one).__name__}.", f"Give a text, or {', '.join(self.fields)}."
            )
        if first not in one:
            raise UserError(f"row {i}: no {first}.", f"A row has {', '.join(self.fields)}.")
        return f"row {i}", {name: one[name] for name in self.fields if one.get(name) is not None}


class Run:
    """A run that was trained here or elsewhere, by its folder.

    Parameters
    ----------
    folder : path
        ``run.dir``. Raises UserError when it holds no run.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config: Config = configuration.load_run(self.folder)

    def __repr__(self) -> str:
        found = self.summary
        return f"fastft.Run({str(self.folder)!r})" + ("" if found is None else f"  # {found.step} steps")

    @property
    def model(self) -> Path:
        """The exported Hugging Face folder. UserError when the run has not ended."""
        if not (self.folder / "model").is_dir():
            raise UserError(f"{self.folder}: holds no exported model: the run has not ended.", "Run.resume() goes on.")
        return self.folder / "model"

    @property
    def records(self) -> list[dict[str, Any]]:
        """Everything that the run recorded (``metrics.jsonl``): settings, a dict a logged step, evaluations, ..."""
        return track.read(self.folder) if (self.folder / "metrics.jsonl").is_file() else []

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged steps: ``step``, ``loss``, ``lr``, ``grad_norm``, ``tokens_per_second``, ..."""
        return [record for record in self.records if record["kind"] == "train"]

    @property
    def summary(self) -> Summary | None:
        """How it ended; None: it has not."""
        ends = [record for record in self.records if record["kind"] == "end"]
        return Summary.of(ends[-1]) if ends else None

    def evaluate(
        self, overrides: Mapping[str, Any] | None = None, *, rows: bool = False, keep: Sequence[str] = ()
    ) -> dict[str, Evaluation]:
        """Evaluate the exported model: an ``Evaluation`` by the name of each set.

        Parameters
        ----------
        overrides : mapping, optional
            As ``fit`` takes them: ``{"data.eval": {"new": "new.csv"}}`` for other data.
        rows : bool
            Also what each row was judged by.
        keep : sequence of str
            Columns of the data to be copied into the rows.
        """
        from fastft.evaluate.metrics import evaluate_model

        config = configuration.configured(configuration.of_trained(self.folder), overrides or {})
        with _own_place():
            return evaluate_model(config, rows=rows, keep=keep)

    def predictor(self, **options: Any) -> Predictions:
        """The exported model's predictions. ``options``: those of the task, such as ``max_length``,
        ``max_new_tokens`` or ``temperature``.
        """
        with _own_place():
            self.model  # noqa: B018  # is there
            return Predictions(str(self.folder), options)

    def export(
        self,
        folder: str | os.PathLike,
        *,
        step: int | None = None,
        best: bool = False,
        merge: bool = False,
        dtype: str | None = None,
    ) -> Path:
        """Write a Hugging Face folder from a checkpoint, and return its path.

        Parameters
        ----------
        step : int, optional
            That of the checkpoint; default: the newest, or the best where early stopping watched.
        best : bool
            The best by ``checkpoint.best_by``.
        merge : bool
            An adapter is merged into its base.
        dtype : str, optional
            fp32 or bf16; default: that of the folder that the run began with.
        """
        from fastft.evaluate.export import export_checkpoint

        with _own_place():
            return export_checkpoint(self.folder, Path(folder), step, dtype, merge, best)

    def resume(self, overrides: Mapping[str, Any] | None = None, **sections: Any) -> Run:
        """Go on from the newest usable checkpoint; arguments as ``fit`` takes them."""
        from fastft.train.loop import resumed

        config = configuration.configured(self.config, {**(overrides or {}), **sections})
        _train(config, resumed)
        return Run(self.folder)


def fit(
    config: str | os.PathLike | Mapping[str, Any] | Config,
    overrides: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    verbosity: int = 0,
    **sections: Any,
) -> Run:
    """Train as a configuration says, in this process, and return the run.

    Parameters
    ----------
    config : path, mapping or Config
        A YAML file, or what is in one.
    overrides : mapping, optional
        Values by dotted key: ``{"optim.lr": 1e-4, "train.steps": 50}``.
    overwrite : bool
        Start over when ``run.dir`` already holds a run.
    verbosity : int
        -1: warnings only, 0: progress, 1: more of it; for this process from here on.
    **sections
        The same by section: ``optim={"lr": 1e-4}, train={"steps": 50}``; the section's other keys stay.

    Raises
    ------
    UserError
        Bad configuration, data or model: what it is and what to do.
    Interrupted
        After Ctrl-C (SIGINT) or SIGTERM, once everything is saved; ``Run(folder).resume()`` goes on.

    Notes
    -----
    Progress goes to standard error. One process is one rank; more of them are started by ``fastft launch``, torchrun
    or deepspeed, each of which then calls ``fit``.
    """
    from fastft.train.loop import train

    found = configuration.configured(config, {**(overrides or {}), **sections})
    track.set_verbosity(verbosity)
    _train(found, lambda config: train(config, overwrite=overwrite))
    return Run(found.run.dir)


_device = ""  # that of this process's first run: DeepSpeed looks for one once, and its process group stays


def _train(config: Config, start: Callable[[Config], object]) -> None:
    import torch

    from fastft.zero.engine import stop_process_group

    global _device
    device = "cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu"
    if _device not in ("", device):
        raise UserError(
            f"run.device: this process has trained on {_device}, and cannot on {device}.", "Start a new one for it."
        )
    if not _device:
        atexit.register(stop_process_group)
    _device = device
    with _own_place():
        start(config)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # rank 0 writes the end of the run's record, which all are about to read


@contextmanager
def _own_place():
    """While inside, the environment may say to torch.distributed where this process stands; what it said comes back
    afterwards, so that the next run, and what else this process starts, is not taken for a rank of this one.
    """
    before = {name: os.environ.get(name) for name in PLACE}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
