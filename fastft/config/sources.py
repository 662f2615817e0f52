"""Where rows are read from, and what a file may say for it."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fastft.config.base import InputPath, Section


class Source(Section):
    """Where rows are read from."""

    path: InputPath = Field(
        "",
        description="File, folder of files, or a data set saved by Hugging Face datasets; or a pattern: data/*.jsonl.",
    )
    dataset: str | None = Field(None, description="Instead of path: a data set of the Hugging Face hub, owner/name.")
    name: str | None = Field(None, description="dataset: its configuration, where it has several.")
    revision: str | None = Field(None, description="dataset: a commit, branch or tag.")
    format: str = Field(
        "auto",
        description="txt, jsonl, json, csv, tsv, parquet, conll, html, xml, hf; auto goes by the name (also .gz).",
    )
    split: str | None = Field(
        None,
        description="Split to read: of a hub's or saved data set, or of a folder whose files begin with its name.",
    )
    columns: dict[str, str] = Field(
        {}, description="Columns to rename: the name that the task reads -> the name in the data."
    )
    element: str | None = Field(None, description="xml: name of the elements that are documents; default: the file.")
    documents: Literal["blank_line", "line", "file"] = Field("blank_line", description="txt: what ends a document.")
    header: list[str] | None = Field(
        None, description="csv, tsv, conll: column names of a file that has no header line."
    )
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="csv, tsv: what separates cells; default: a comma, a tab."
    )
    quoting: Literal["standard", "none"] = Field(
        "standard", description="csv/tsv: 'none' takes quote characters as text."
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if bool(self.path) == bool(self.dataset):
            raise ValueError("a source has a path (of files here) or a dataset (owner/name on the hub): give one")
        if not self.dataset and (self.name or self.revision):
            raise ValueError("name and revision are of a dataset on the hub; files have a path alone")
        return self


class TrainSource(Source):
    """A source of training data, and its part in a mixture."""

    name: str | None = Field(
        None,
        description="What the source is called in data.curriculum and in records; default: its source, or the last "
        "part of its path. dataset: its configuration, where it has several.",
    )
    source: str | None = Field(
        None,
        description="Of a prepared corpus: the source in it that is read, by its name there; default: all of them.",
    )
    weight: float | None = Field(
        None,
        ge=0,
        description="Share of all targets (tokens to be predicted) that come from here, of the sum of all sources' "
        "weights. A source that is too small is read again. All sources have one, or none.",
    )
    epochs: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="With weights: how often the source is read at most; the others then share what was its. Without: "
        "how often it is read in an epoch of the run.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if bool(self.path) == bool(self.dataset):
            raise ValueError("a source has a path (of files here) or a dataset (owner/name on the hub): give one")
        if not self.dataset and self.revision:
            raise ValueError("revision is of a dataset on the hub")
        return self

    @property
    def label(self) -> str:
        """What it is called."""
        if self.dataset:
            return "/".join(part for part in (self.dataset, self.name, self.split) if part)
        return self.name or self.source or called(self.path)


class Stage(Section):
    """The weights of a part of the run."""

    until: int | float = Field(
        gt=0, description="Where they end: an integer counts steps, a fraction (0.5) is of all steps."
    )
    weights: dict[str, float] = Field(
        description="Weight by the source's name; sources that are not named have none in this stage."
    )

    @field_validator("until")
    @classmethod
    def _a_fraction_or_steps(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError("is neither a fraction of all steps (below 1) nor a whole number of steps")
        return value

    @field_validator("weights")
    @classmethod
    def _not_negative(cls, value: dict[str, float]) -> dict[str, float]:
        if least := [name for name, weight in value.items() if weight < 0]:
            raise ValueError(f"the weight of {least[0]} is negative")
        return value


def called(path: str) -> str:
    """A name for what lies under a path: of raw/news/*.jsonl.gz news, of raw/cases.txt cases."""
    parts = [re.sub(r"[^\w-]+", "-", part.partition(".")[0]).strip("-") for part in path.split("/") if "*" not in part]
    return next((part for part in reversed(parts) if part), "source")


def _sources(value: Any) -> Any:
    """A path, a source, or a list of either, as a list of sources."""
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [{"path": v} if isinstance(v, str) else v for v in values]


def _eval_sets(evals: Any) -> Any:
    """Sets by name; sources without a name are the set 'eval'."""
    if evals is None:
        return {}
    if isinstance(evals, (str, list)):
        evals = {"eval": evals}
    if isinstance(evals, dict):
        if isinstance(evals.get("path"), str) or isinstance(
            evals.get("dataset"), str
        ):  # one source written out, not a dict of sets
            evals = {"eval": evals}
        evals = {name: _sources(value) for name, value in evals.items()}
    return evals


_Given = str | Source | list[str | Source] | None  # what a file may say for a list of sources
_Trained = str | TrainSource | list[str | TrainSource] | None
TrainSources = Annotated[list[TrainSource], BeforeValidator(_sources, json_schema_input_type=_Trained)]
EvalSets = Annotated[
    dict[str, list[Source]], BeforeValidator(_eval_sets, json_schema_input_type=_Given | dict[str, _Given])
]
