"""What `fastft prepare` reads: the sources of a corpus, the rules that clean them, and where the tokens go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from fastft import rooms
from fastft.config.base import InputPath, OutputPath, Section, specialized
from fastft.config.loading import expanded, globbed, section
from fastft.config.reading import read
from fastft.config.sources import Source, called
from fastft.errors import UserError


class Files(Source):
    """Files here or behind a URL."""

    path: InputPath = Field(
        "", description="File, folder, pattern (raw/*.jsonl.gz), or a URL that fsspec knows (s3://bucket/folder)."
    )
    name: str | None = Field(
        None, pattern=r"^[\w.-]+$", description="What the source is called; default: the last part of its path."
    )
    encoding: str = Field("utf-8", description="Of text files.")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.dataset or self.revision or not self.path:
            raise ValueError("a corpus is made from files: give a path (of a hub's data set: its Parquet files)")
        if self.columns:
            raise ValueError("columns: nothing is renamed here; say the column of the text itself (text, texts)")
        return self

    @field_validator("path")
    @classmethod
    def _local(cls, value: str) -> str:
        """A file of this machine by its path, whatever way it was written."""
        scheme, _, rest = value.partition("://")
        return rest if scheme in ("file", "local") else value

    @field_validator("encoding")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            "".encode(value)  # a codec that is of text
        except LookupError:
            raise ValueError(f"{value!r} is no text encoding that Python knows") from None
        return value

    @property
    def remote(self) -> bool:
        return "://" in self.path

    @property
    def called(self) -> str:
        """Its name, or one for what lies under its path."""
        return self.name or called(self.path)


class CorpusSource(Files):
    """Files of one kind and origin. They keep their name and licence in the manifest, and tokens of two sources are
    never in one shard."""

    licence: str | None = Field(None, description="Of the source, for the manifest.")
    text: str = Field("text", description="Column of the text.")


def listed(value: Any) -> Any:
    """A path, files, or a list of either, as a list of files."""
    values = value if isinstance(value, list) else [value]
    return [{"path": v} if isinstance(v, str) else v for v in values]


CorpusSources = Annotated[
    list[CorpusSource],
    BeforeValidator(listed, json_schema_input_type=str | CorpusSource | list[str | CorpusSource]),
]


class Rules(Section):
    """What is changed and left out, in a fixed order: every rule is a key of this section."""

    members: ClassVar = rooms.RULES


class NearDuplicates(Section):
    """Documents that are nearly the same: compared by their n-grams of words, of which case and punctuation do not
    count, nor white space; a character of scripts without spaces is a word.
    """

    ngram: int = Field(5, ge=1, le=100, description="Words of an n-gram.")
    threshold: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Left out is what shares so much of all n-grams with a document that stays (Jaccard).",
    )
    bands: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Hashes by which documents are found that are then compared; default: by the threshold, so that of "
        "pairs at it 99 % are compared. Each takes 8 bytes a document.",
    )
    rows: int | None = Field(
        None, ge=1, le=32, description="MinHash values in each of them; default: as many as 20 bands allow, at most 6."
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="Of the MinHash permutations.")


class Duplicates(Section):
    """Which documents count as the same; of them the first stays, across all files and sources."""

    exact: bool = Field(True, description="Documents with the same text after the rules.")
    near: NearDuplicates | None = Field(None, description="Those that are nearly the same, too; true: by the defaults.")

    named: ClassVar = {"exact": {}, "near": {"near": {}}, "keep": {"exact": False}}

    @model_validator(mode="after")
    def _exact_is_near(self) -> Self:
        if self.near is not None and not self.exact:
            raise ValueError("exact: false beside near: documents with the same text are nearly the same, too")
        return self


def _listed(value: Any) -> Any:
    """ids and files as a list. ValueError for what YAML took for a number: an id of digits alone, or like 1e5."""
    values = value if isinstance(value, list) else [value]
    if numbers := [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]:
        raise ValueError(
            f"{numbers[0]!r} is what YAML makes of digits, and zeros in front are lost: write the id in quotes"
        )
    return [value] if isinstance(value, str) else value


class Ray(Section):
    """Where the work is done by actors of a Ray cluster."""

    address: str | None = Field(
        None,
        description="Of the cluster (head:6379, ray://head:10001, auto); default: RAY_ADDRESS, the one that runs here, "
        "or else one that is started here.",
    )


class Slurm(Section):
    """Where the work is done by jobs of Slurm that connect to the process that reads and writes."""

    partition: str | None = Field(None, description="Of the jobs; default: Slurm's.")
    time: str | None = Field(None, description='Limit of a job, as Slurm writes it, in quotes: "2:00:00".')
    options: list[str] = Field([], description="More options of sbatch: [--mem=8G, --account=x].")
    host: str | None = Field(
        None, min_length=1, description="Name or address of this machine that the nodes know; default: its host name."
    )
    wait: int = Field(3600, ge=1, description="Seconds in which a first job has to start.")

    @field_validator("time", mode="before")
    @classmethod
    def _in_quotes(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(f'{value} is what YAML makes of digits and colons: put it in quotes ("2:00:00")')
        return value


class Executor(Section):
    """Who cleans and tokenizes; one process here reads and writes."""

    ray: Ray | None = Field(None, description="Actors of a Ray cluster; true: by the defaults.")
    slurm: Slurm | None = Field(None, description="Jobs of Slurm; true: by the defaults.")

    named: ClassVar = {"local": {}, "ray": {"ray": {}}, "slurm": {"slurm": {}}}

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.ray is not None and self.slurm is not None:
            raise ValueError("ray beside slurm: choose one")
        return self


class CorpusConfig(Section):
    """One corpus: raw files in, shards of tokens out."""

    version: Literal[1] = Field(1, description="Version of this file's format.")
    sources: CorpusSources = Field(min_length=1, description="A path or URL, a source, or a list of them.")
    output: OutputPath = Field(description="Folder of the corpus: its shards, and manifest.json when it is complete.")
    tokenizer: InputPath = Field(description="Folder or hub id of the model or tokenizer that will train on it.")
    revision: str | None = Field(None, description="Commit or tag of a hub id.")
    rules: SerializeAsAny[Rules] = Field(Rules(), description="A rule's name, a list or a mapping of rules.")
    duplicates: Duplicates = Field(
        Duplicates(),
        description="exact: of documents with the same text after the rules the first stays; near: of those with "
        "nearly the same, too (a mapping has its settings); keep: all stay.",
    )
    remove: Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = Field(
        [],
        description="Documents that are taken out: their ids (fastft inspect CORPUS --document), or files with one on "
        "each line. Of a corpus that is there, only the shards that hold them are written anew.",
    )
    shard_tokens: int = Field(1 << 26, ge=1, description="Tokens of a shard, at most (a block of rows is not cut).")
    max_document_bytes: int = Field(
        1 << 22,
        ge=1 << 10,
        description="Longest document, in bytes of UTF-8. Longer text is split; longer rows of other files are left "
        "out, and counted. A line may be 8 times as long.",
    )
    unreadable: Literal["error", "skip"] = Field(
        "error",
        description="A file that cannot be read (to its end). skip: what is behind the fault is left out, and "
        "the manifest says so.",
    )
    encoder: Literal["auto", "gigatoken", "tokenizers"] = Field(
        "auto",
        description="What makes the tokens. auto: gigatoken where it is installed and gives the tokenizer's ids on a "
        "sample of this corpus.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Processes that clean and tokenize; default: the cores, of this machine or the Ray cluster; of "
        "Slurm's jobs the number must be said. The result is the same.",
    )
    executor: Executor = Field(
        Executor(),
        description="Where they run: local, ray or slurm; a mapping has its settings. The result is the same.",
    )

    @model_validator(mode="after")
    def _jobs(self) -> Self:
        if self.executor.slurm is not None and self.workers is None:
            raise ValueError("workers: executor: slurm wants the number of jobs")
        return self


def load_corpus(path: str | Path, overrides: Sequence[str] = ()) -> CorpusConfig:
    """Read and check the configuration of a corpus. UserError names the file and the key."""
    where = str(path)
    config = expanded(corpus_config(read(path, overrides), where), where)
    globbed([source for source in config.sources if not source.remote], f"{where}: sources")  # refused where nothing is
    return config.changed(sources=[s.changed(name=s.called) for s in config.sources])


def corpus_config(raw: dict[str, Any], where: str) -> CorpusConfig:
    """A plain mapping, checked. UserError names ``where`` and the key."""
    if not isinstance(raw.get("rules", {}), dict | list | str | None):
        raise UserError(f"{where}: rules: is neither a mapping nor a list of rules.")
    sections = ("rules", "duplicates", "executor")  # null: the default
    raw = {key: value for key, value in raw.items() if value is not None or key not in sections}
    return section(specialized(CorpusConfig, raw), raw, where)  # type: ignore[return-value]
