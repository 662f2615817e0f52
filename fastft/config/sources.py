"""Where rows are read from, and what a file may say for it."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

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
Sources = Annotated[list[Source], BeforeValidator(_sources, json_schema_input_type=_Given)]
EvalSets = Annotated[
    dict[str, list[Source]], BeforeValidator(_eval_sets, json_schema_input_type=_Given | dict[str, _Given])
]
