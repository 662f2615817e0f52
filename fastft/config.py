"""The configuration: strict pydantic models, read from one YAML file, every value open to dotted overrides.

Field descriptions are the documentation: ``fastft config schema`` prints them as JSON Schema.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fastft.errors import UserError, did_you_mean

# PyYAML lets through what int(), datetime() and Python's stack say of a value; UnicodeDecodeError is a ValueError.
BROKEN_YAML = (yaml.YAMLError, ValueError, RecursionError)
Beta = Annotated[float, Field(ge=0, lt=1)]
Path_ = str  # paths stay strings: they may be hub ids, and they go back into YAML


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` for a number is a mistake, not 1."""
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(
                f"{str(value).lower()} is no value for it (on, off, yes, no, true and false are booleans in YAML)"
            )
        return value


class Model(Section):
    path: Path_ = Field(description="Folder or hub id of the model to start from (config, tokenizer, weights).")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="'random' draws new weights for path's config.json."
    )
    tokenizer: Path_ | None = Field(None, description="Folder or hub id of the tokenizer; default: path.")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype of parameters and gradients; Adam's state and master weights are fp32."
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="transformers' attn_implementation."
    )
    revision: str | None = Field(None, description="Commit or tag of a hub id.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model; needs a pinned revision for hub ids."
    )
    freeze: list[str] = Field([], description="Parameter name patterns (fnmatch) that are not trained.")

    @model_validator(mode="after")
    def _remote_code_is_pinned(self):
        if self.trust_remote_code and not self.revision and not Path(self.path).exists():
            raise ValueError(
                "model.trust_remote_code runs code from the hub: pin it with model.revision (a commit hash)"
            )
        return self


class Source(Section):
    path: Path_ = Field(description="File, folder of files, or a data set saved by Hugging Face datasets.")
    format: str = Field("auto", description="txt, jsonl, csv, tsv, parquet, hf; auto goes by the name (.gz allowed).")
    split: str | None = Field(None, description="Split to read from a saved DatasetDict.")
    documents: Literal["blank_line", "line", "file"] = Field("blank_line", description="txt: what ends a document.")
    header: list[str] | None = Field(None, description="csv/tsv: column names of a file that has no header line.")
    quoting: Literal["standard", "none"] = Field(
        "standard", description="csv/tsv: 'none' takes quote characters as text."
    )


class Data(Section):
    train: list[Source] = Field([], description="Training sources: a path, a list of paths, or a list of sources.")
    eval: dict[str, list[Source]] = Field({}, description="Evaluation sets by name (a bare path is named 'eval').")
    max_length: int | None = Field(
        None, ge=2, description="Longest sequence in tokens; default: the model's limit, at most 1024."
    )
    overlength: Literal["error", "truncate", "split", "drop"] = Field(
        "error", description="What happens to a text longer than max_length."
    )
    packing: Literal["isolated", "none"] = Field(
        "isolated", description="causal_lm: fill sequences with whole documents that cannot see each other."
    )
    text: str = Field("text", description="Column of the text.")
    text_pair: str | None = Field(None, description="classification: column of a second text.")
    label: str = Field("label", description="classification: column of the label(s).")
    multi_label: bool = Field(False, description="classification: any number of labels per row.")
    label_separator: str = Field(",", min_length=1, description="multi_label: what separates labels in a string cell.")
    labels: Path_ | None = Field(
        None, description="File with one label name per line; data may then hold names or 0-based indices."
    )
    cache: Path_ | None = Field(None, description="Where prepared data goes; default: <run.dir>/prepared.")
    seed: int = Field(17, ge=0, lt=1 << 63, description="Seed of the sample order.")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any):
        if isinstance(data, dict):
            if "train" in data:
                data["train"] = _sources(data["train"])
            evals = {} if data.get("eval", {}) is None else data.get("eval")
            if isinstance(evals, (str, list)):
                evals = {"eval": evals}
            if isinstance(evals, dict):
                if "path" in evals and isinstance(evals["path"], str):  # one source written out, not a dict of sets
                    evals = {"eval": evals}
                data["eval"] = {name: _sources(value) for name, value in evals.items()}
        return data


def _sources(value: Any) -> Any:
    """A path, a source, or a list of either, as a list of sources."""
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [{"path": v} if isinstance(v, str) else v for v in values]


class Batch(Section):
    size: int | None = Field(None, ge=1, description="Sequences per optimizer step, over all ranks.")
    global_tokens: int | None = Field(
        None, ge=1, description="Instead of size: tokens per step (size = global_tokens / max_length)."
    )
    micro: int | Literal["auto"] = Field(
        "auto",
        description="Sequences per forward on one rank; auto sorts a step's sequences by length and splits them to avoid padding.",
    )
    micro_tokens: int = Field(
        16384, ge=1, description="micro: auto keeps a forward within this many (padded) tokens per rank."
    )

    @model_validator(mode="after")
    def _one_of(self):
        if self.size is not None and self.global_tokens is not None:
            raise ValueError("batch.size and batch.global_tokens exclude each other: give one")
        if isinstance(self.micro, int) and self.micro < 1:
            raise ValueError("batch.micro must be at least 1, or 'auto'")
        return self


class Optim(Section):
    name: Literal["fused_adamw"] = Field("fused_adamw", description="The optimizer.")
    lr: float = Field(2e-5, gt=0, description="Peak learning rate.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's decay rates.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Decoupled weight decay; never on biases and norms (parameters of fewer than two dimensions).",
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear", description="Learning-rate schedule after the warm-up."
    )
    warmup: int | float = Field(
        0, ge=0, description="Warm-up: an integer counts steps, a fraction (0.03) is of all steps."
    )
    decay: int | float = Field(0.2, ge=0, description="wsd: length of the final decay, counted as warmup is.")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="Learning rate at the end, as a share of lr (linear, cosine, wsd)."
    )
    grad_clip: float | None = Field(1.0, gt=0, description="Largest global gradient norm; null: no clipping.")
    state_dtype: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="How Adam's two moments are kept: 8, 4 or 2 bytes per parameter; bf16 and int8 are rounded "
        "stochastically.",
    )
    master: Literal["fp32", "remainder", "stochastic"] = Field("fp32", description="model.dtype bf16, parallel.zero 1 to 3: the weights that the optimizer updates. fp32: a "
        "copy of 4 bytes; remainder: the same number as bf16 and its 16-bit remainder; stochastic: bf16, rounded at random. The last two also keep "
        "ZeRO's gradients in bf16.")  # fmt: skip

    @model_validator(mode="after")
    def _fractions(self):
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if isinstance(value, float) and value > 1:
                raise ValueError(
                    f"optim.{name}: {value} is neither a fraction of all steps (0 to 1) nor a whole number of steps"
                )
        return self


class Loss(Section):
    implementation: Literal["auto", "linear_cross_entropy", "cross_entropy"] = Field(
        "auto",
        description="causal_lm: linear_cross_entropy goes from hidden states to the loss without holding all logits; cross_entropy takes the model's logits; auto: the former where a check on the model finds the same loss.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    z_loss: float = Field(0.0, ge=0, description="Weight of logsumexp^2 (keeps logits small).")


class Train(Section):
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="Passes over the training data; 1 when steps is not given either."
    )
    steps: int | None = Field(None, ge=1, le=10**12, description="Optimizer steps; instead of epochs.")
    eval_every: int | None = Field(
        None, ge=1, description="Evaluate every N steps (and always at the end); null: only at the end."
    )
    log_every: int = Field(10, ge=1, description="Telemetry every N steps.")
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="Stop when a step's loss is more than this many times the median of the 50 before it; null: never.",
    )
    max_skipped: int = Field(
        10, ge=0, description="Stop after more than this many consecutive steps skipped for NaN or Inf gradients."
    )

    @model_validator(mode="after")
    def _one_of(self):
        if self.epochs is not None and self.steps is not None:
            raise ValueError("train.epochs and train.steps exclude each other: give one")
        return self


class Parallel(Section):
    zero: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage.")
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward: less memory, a third more work."
    )
    fused_step: bool = Field(
        True,
        description="ZeRO 1-3: unscale, clip, Adam and the weights' store in one pass over memory, where DeepSpeed's step allows it.",
    )
    verify_every: int | None = Field(
        1000,
        ge=1,
        description="ZeRO 0-2, many ranks: every N steps compare a sum over the weights' bits between ranks; null: never.",
    )
    deepspeed: Path_ | dict[str, Any] | None = Field(
        None, description="More DeepSpeed settings (JSON file or mapping); keys fastft owns are refused."
    )


class Checkpoint(Section):
    every: int | None = Field(
        None, ge=1, description="Save every N steps; null: only at the end and on SIGINT/SIGTERM."
    )
    keep: int = Field(2, ge=1, description="Checkpoints kept.")
    best_by: str | None = Field(
        None,
        description="Keep the best checkpoint too, by SET.METRIC (domain.loss, test.accuracy) where both are due at a step; BEST names it.",
    )
    background: bool = Field(
        True, description="Copy the state to memory and write it while training goes on; false: wait for the disk."
    )


class Run(Section):
    dir: Path_ = Field("runs/default", description="Folder of this run: checkpoints, metrics.jsonl, model/.")
    seed: int = Field(17, ge=0, lt=1 << 63, description="Seed of weights and dropout.")
    offline: bool = Field(False, description="Never ask the hub.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when there is one.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per rank; default: the cores, divided among the ranks of this node."
    )


class Config(Section):
    """One fastft run."""

    version: Literal[1] = Field(1, description="Version of this file's format.")
    task: str = Field(description="causal_lm, classification.")
    model: Model
    data: Data = Data()
    batch: Batch = Batch()
    optim: Optim = Optim()
    loss: Loss = Loss()
    train: Train = Train()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()

    @model_validator(mode="after")
    def _master_is_not_ignored(self):
        if self.optim.master != "fp32" and (self.model.dtype != "bf16" or self.parallel.zero == 0):
            raise ValueError(
                f"optim.master: {self.optim.master} needs model.dtype: bf16 and parallel.zero: 1, 2 or 3 "
                f"(here {self.model.dtype} and {self.parallel.zero}): nothing else has weights that it could replace"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, raw: Any):
        """`loss:` with nothing below it is the section with its defaults."""
        if isinstance(raw, dict):
            raw = {
                key: {}
                if value is None and key in cls.model_fields and key not in ("version", "task", "model")
                else value
                for key, value in raw.items()
            }
        return raw


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply dotted overrides (``optim.lr=1e-4``), validate.

    Raises
    ------
    UserError
        Names the file and the key, with a did-you-mean for unknown keys.
    """
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such configuration file.", near)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except BROKEN_YAML as e:
        raise UserError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: expected a mapping of sections, got {type(raw).__name__}.", "See configs/ for examples."
        )
    for override in overrides:
        _apply_override(raw, override)
    return validate(raw, str(path))


def validate(raw: dict, where: str = "config") -> Config:
    """Validate a plain mapping. UserError lists every mistake, one line each."""
    return section(Config, raw, where)


def section(kind: type[Section], raw: dict, where: str) -> Any:
    """One section of a configuration from a plain mapping; errors as in ``validate``."""
    try:
        return kind.model_validate(raw)
    except ValidationError as e:
        lines = [_explain(error, raw) for error in e.errors()]
        raise UserError(
            f"{where}: {len(lines)} mistake{'s' * (len(lines) > 1)}:\n" + "\n".join(f"  {line}" for line in lines),
            "`fastft config schema` lists every key with its meaning.",
        ) from None


def dump(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that ``load`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def absolute(config: Config) -> Config:
    """The configuration with every local path in full, so that it means the same from any working directory."""
    raw = config.model_dump(mode="json")
    model, data = raw["model"], raw["data"]
    holders = [(model, "path"), (model, "tokenizer"), (data, "labels"), (raw["parallel"], "deepspeed")]
    holders += [
        (source, "path") for source in [*data["train"], *(s for sources in data["eval"].values() for s in sources)]
    ]
    for holder, key in holders:
        if isinstance(holder[key], str) and Path(holder[key]).exists():  # a hub id does not
            holder[key] = str(Path(holder[key]).absolute())
    for holder, key in ((data, "cache"), (raw["run"], "dir")):
        if holder[key] is not None:
            holder[key] = str(Path(holder[key]).absolute())
    return Config.model_validate(raw)


def inputs(config: Config) -> list[Path]:
    """Every local file and folder that a run reads. model.path and model.tokenizer are hub ids unless they are there or can only be a path."""
    model, data = config.model, config.data
    sources = [source.path for group in (data.train, *data.eval.values()) for source in group]
    folders = [
        path
        for path in (model.path, model.tokenizer)
        if path and (Path(path).exists() or path.startswith(("/", ".", "~")))
    ]
    more = [path for path in (data.labels, config.parallel.deepspeed) if isinstance(path, str)]
    return [Path(path) for path in dict.fromkeys([*folders, *sources, *more])]


class _UniqueKeyLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key written twice (YAML itself would keep the last in silence), and reads 2e-5 as a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list, set)):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"a {type(key).__name__} stands where a key belongs (a template's braces?)",
                    key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 2e-5 for a string, since it wants a dot and a sign; every fine-tuning file has one.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _apply_override(raw: dict, override: str) -> None:
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise UserError(f"Override {override!r} is not of the form section.key=value.", "For example: optim.lr=2e-5")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except BROKEN_YAML as e:
        raise UserError(f"Override {override!r}: the value is not valid YAML: {e}") from None
    *parents, last = key.split(".")
    node = raw
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise UserError(f"Override {override!r}: {name!r} holds a {type(child).__name__}, not a section.")
        node = child
    node[last] = value


def _explain(error: dict, raw: dict) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key. {did_you_mean(str(error['loc'][-1]), _keys_at(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{key}: required, but not there."
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(error.get("input"))
    if error["type"] == "value_error" or len(shown) > 80:
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (got {shown})"


def _keys_at(loc: tuple) -> list[str]:
    """Field names of the section that a validation error's location leads to."""
    model: Any = Config
    for part in loc:
        if (
            isinstance(part, str)
            and isinstance(model, type)
            and issubclass(model, BaseModel)
            and part in model.model_fields
        ):
            model = model.model_fields[part].annotation
        while get_origin(model) is not None:  # list[Source], dict[str, list[Source]]
            model = get_args(model)[-1]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
