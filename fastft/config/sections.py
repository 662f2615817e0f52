"""The sections that every run has. What a task, an optimizer or another member adds stands beside its code, as its
``Settings``.

Field descriptions are the documentation: ``fastft config schema`` prints them as JSON Schema.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from fastft import rooms
from fastft.config.base import InputPath, OutputPath, Section
from fastft.config.evaluation import Evaluation
from fastft.config.every import Every
from fastft.config.mixture import Shares, shares_of
from fastft.config.sources import EvalSets, Stage, TrainSources
from fastft.errors import UserError


class Model(Section):
    """The model to start from, and what is changed in it: every model edit is a key of this section."""

    members: ClassVar = rooms.EDITS
    scalar: ClassVar = "path"

    path: InputPath = Field(description="Folder or hub id of the model to start from (config, tokenizer, weights).")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="'random' initializes new weights for path's config.json."
    )
    tokenizer: InputPath | None = Field(None, description="Folder or hub id of the tokenizer; default: path.")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype of parameters and gradients; Adam's state and master weights are fp32."
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "varlen"] = Field(
        "auto",
        description="transformers' attn_implementation, or varlen: packed documents one by one instead of behind a "
        "mask, on a GPU by cuDNN or torch's flash attention, and encoders without padding. auto: varlen where a check "
        "on the model finds the same logits; eager for pairs of short texts on a CPU; sdpa elsewhere.",
    )
    layers: Literal["auto", "plain"] = Field(
        "auto",
        description="auto: with varlen attention, decoder layers as one fused function each, which on a CPU without "
        "instructions for bf16 computes bf16 weights in float32; elsewhere, on a GPU, their norms and gated MLPs. "
        "Where a check on the model finds the same gradients. plain: as transformers has them.",
    )
    revision: str | None = Field(None, description="Commit or tag of a hub id.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model; needs a pinned revision for hub ids."
    )
    freeze: list[str] = Field([], description="Parameter name patterns (fnmatch) that are not trained.")
    new_head: bool = Field(
        False, description="Initialize the task's head anew where the folder holds one (trained for other labels)."
    )
    resize_embeddings: bool = Field(
        False, description="Give the embedding rows for tokens of the tokenizer that the model does not know."
    )

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> Self:
        if self.trust_remote_code and not self.revision and not Path(self.path).exists():
            raise ValueError(
                "model.trust_remote_code runs code from the hub: pin it with model.revision (a commit hash)"
            )
        return self


class Order(Section):
    """Which samples each step takes."""

    name: str = Field(
        "permutation",
        description="permutation: every sample once an epoch, in a new random order each time. length_groups, the "
        "default for seq2seq: the same, texts of about one length beside each other.",
    )

    scalar: ClassVar = "name"


class Data(Section):
    """What all tasks read alike; each task adds its columns."""

    aliases: ClassVar = {"overlength": "truncation"}

    train: TrainSources = Field([], description="Training sources: a path, a list of paths, or a list of sources.")
    eval: EvalSets = Field({}, description="Evaluation sets by name (a bare path is named 'eval').")
    max_length: int | None = Field(
        None, ge=2, description="Longest sequence in tokens; default: the model's limit, at most 1024."
    )
    truncation: Literal["error", "truncate", "split", "drop"] = Field(
        "error", description="What happens to a row that is longer than max_length."
    )
    cache: OutputPath | None = Field(None, description="Where prepared data goes; default: <run.dir>/prepared.")
    workers: int | None = Field(
        None, ge=1, description="Processes that prepare data; default: one for each core. The result is the same."
    )
    order: SerializeAsAny[Order] = Field(Order(), description="The sample order, by name, with its settings.")
    curriculum: list[Stage] = Field(
        [],
        description="Stages with weights of their own for the sources of data.train, whose weights hold after the last "
        "stage.",
    )
    seed: int = Field(17, ge=0, lt=1 << 63, description="Seed of the sample order.")

    @property
    def shares(self) -> Shares | None:
        """The mixture of the training sources; None: they are read as one."""
        return shares_of(self.train, self.curriculum)


FORWARD_TOKENS = 16384


class Batch(Section):
    """How much a step takes, and how it is cut."""

    size: int | None = Field(None, ge=1, description="Sequences per optimizer step, over all ranks.")
    global_tokens: int | None = Field(
        None, ge=1, description="Instead of size: tokens per step (size = global_tokens / max_length)."
    )
    micro: int | Literal["auto"] = Field(
        "auto",
        description="Sequences per forward on one rank; auto sorts a step's sequences by length and splits them to "
        "avoid padding.",
    )
    micro_tokens: int | Literal["auto"] = Field(
        FORWARD_TOKENS,
        description="micro: auto keeps a forward within this many (padded) tokens per rank. auto: as many as fit the "
        "memory with a margin, found before the first step on the longest rows; the run's config.yaml has the number.",
    )
    pad_to_multiple_of: int = Field(
        1, ge=1, description="Rows are padded to a multiple of so many tokens; some models need it (Reformer)."
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.size is not None and self.global_tokens is not None:
            raise ValueError("batch.size and batch.global_tokens exclude each other: give one")
        for name in ("micro", "micro_tokens"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ValueError(f"batch.{name} must be at least 1, or 'auto'")
        if self.micro != "auto" and self.micro_tokens == "auto":
            raise ValueError("batch.micro_tokens: auto needs batch.micro: auto, which goes by it")
        return self

    @property
    def forward_tokens(self) -> int:
        """Most tokens of a forward: ``micro_tokens``, or its default while auto has not been settled."""
        return FORWARD_TOKENS if self.micro_tokens == "auto" else self.micro_tokens

    def sequences(self, longest: int) -> int:
        """Of an optimizer step, of at most ``longest`` tokens each. UserError for global_tokens of less than one."""
        if self.global_tokens is None:
            return self.size or 32
        if self.global_tokens < longest:
            raise UserError(
                f"batch.global_tokens = {self.global_tokens} is less than one sequence (data.max_length = {longest}).",
                "Raise batch.global_tokens or lower data.max_length.",
            )
        return self.global_tokens // longest


class Optim(Section):
    """What all optimizers have; each adds its own settings. Every parameter grouping is a key of this section."""

    members: ClassVar = rooms.GROUPINGS

    name: str = Field("fused_adamw", description="The optimizer.")
    lr: float = Field(2e-5, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Weight decay; never on biases and norms (parameters of fewer than two dimensions).",
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

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if isinstance(value, float) and value > 1:
                raise ValueError(
                    f"optim.{name}: {value} is neither a fraction of all steps (0 to 1) nor a whole number of steps"
                )
        return self


class Loss(Section):
    """Each task adds the settings of its loss."""

    members: ClassVar = rooms.OBJECTIVES


class Train(Section):
    """How long, and what is watched: every configurable observer is a key of this section."""

    members: ClassVar = rooms.OBSERVERS

    epochs: float | None = Field(
        None, gt=0, le=1e6, description="Passes over the training data; 1 when steps is not given either."
    )
    steps: int | None = Field(None, ge=1, le=10**12, description="Optimizer steps; instead of epochs.")
    eval_every: Every | None = Field(
        None,
        description="Evaluate every N steps, every epoch (epoch, 0.5 epochs) or after a time (30m), and at the end; "
        "null: only at the end.",
    )
    eval_at_start: bool = Field(
        False, description="Evaluate before the first step, too; checkpoint.best_by and early stopping pass it over."
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
    def _one_of(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("train.epochs and train.steps exclude each other: give one")
        return self


class Parallel(Section):
    """Many ranks."""

    zero: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage.")
    offload: Literal["optimizer", "parameters"] | None = Field(
        None,
        description="Keep state in the host's memory. optimizer (zero 1-3): its state and the master weights, and the "
        "update is made there; parameters (zero 3): the shards of the weights, too. The same numbers as without.",
    )
    offload_dir: InputPath | None = Field(
        None,
        description="Folder on a disk of every host where what is offloaded lies, in files that are mapped into memory "
        "and go with the run. The same numbers; checkpoints are written before the training goes on.",
    )
    sequence: int = Field(
        1,
        ge=1,
        description="So many ranks hold a part of each sequence (Ulysses): causal_lm and sft. It divides the number of "
        "ranks and the model's attention heads. The same numbers as with 1.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward: less memory, a third more work."
    )
    fused_step: bool = Field(
        True,
        description="ZeRO 1-3: unscale, clip, Adam and the weights' store in one pass over memory, where DeepSpeed's "
        "step allows it.",
    )
    verify_every: int | None = Field(
        1000,
        ge=1,
        description="ZeRO 0-2, many ranks: every N steps compare a sum over the weights' bits between ranks; "
        "null: never.",
    )
    deepspeed: InputPath | dict[str, Any] | None = Field(
        None, description="More DeepSpeed settings (JSON file or mapping); keys fastft owns are refused."
    )

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> Self:
        least = {None: 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero < least:
            raise ValueError(
                f"parallel.offload: {self.offload} needs parallel.zero: {least}{'' if least == 3 else ' or more'} "
                f"(here {self.zero})"
            )
        if self.offload_dir is not None and self.offload is None:
            raise ValueError("offload_dir needs offload: optimizer or parameters; or set offload_dir: null")
        return self


class Checkpoint(Section):
    """What is kept of a run."""

    every: Every | None = Field(
        None,
        description="Save every N steps, every epoch (epoch) or after a time (30m); null: only at the end and on "
        "SIGINT or SIGTERM.",
    )
    keep: int = Field(2, ge=1, description="Checkpoints kept.")
    best_by: str | None = Field(
        None,
        description="Keep the best checkpoint too, by SET.METRIC (domain.loss, test.accuracy) where both are due at a "
        "step; BEST names it.",
    )
    background: bool = Field(
        True, description="Copy the state to memory and write it while training goes on; false: wait for the disk."
    )


class Trackers(Section):
    """Where records go beside metrics.jsonl and the terminal."""

    members: ClassVar = rooms.TRACKERS


class Run(Section):
    """Where and on what a run takes place."""

    dir: OutputPath = Field("runs/default", description="Folder of this run: checkpoints, metrics.jsonl, model/.")
    seed: int = Field(17, ge=0, lt=1 << 63, description="Seed of weights and dropout.")
    offline: bool = Field(False, description="Never ask the hub.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when there is one.")
    deterministic: bool = Field(
        False,
        description="GPU: the same bits in every run of one configuration, by slower kernels (attention adds up "
        "gradients in the order in which they come); an operation that has no such kernel ends the run with its name. "
        "A CPU always gives them.",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per rank; default: the cores, divided among the ranks of this node."
    )
    trackers: SerializeAsAny[Trackers] = Field(
        Trackers(),
        description="A name, a list of names, or a mapping of names to settings: tensorboard, mlflow, wandb.",
    )


class Config(Section):
    """One fastft run. ``data``, ``loss``, ``evaluation`` and ``optim`` are those of the task and the
    optimizer that it names."""

    version: Literal[1] = Field(1, description="Version of this file's format.")
    task: str = Field(description="The task: a file of fastft/tasks.")
    model: SerializeAsAny[Model]
    if TYPE_CHECKING:  # whose class is known when the file is read
        data: Any = None
        optim: Any = None
        loss: Any = None
        evaluation: Any = None
    else:
        data: SerializeAsAny[Data] = Data()
        optim: SerializeAsAny[Optim] = Optim()
        loss: SerializeAsAny[Loss] = Loss()
        evaluation: SerializeAsAny[Evaluation] = Evaluation()
    batch: Batch = Batch()
    train: SerializeAsAny[Train] = Train()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    run: SerializeAsAny[Run] = Run()

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, raw: Any) -> Any:
        """`loss:` with nothing below it is the section with its defaults."""
        if not isinstance(raw, dict):
            return raw
        needed = ("version", "task", "model")
        empty = {key for key, value in raw.items() if value is None and key in cls.model_fields and key not in needed}
        return {key: {} if key in empty else value for key, value in raw.items()}

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        self.optim.settle(self)
        if self.data.shares is not None and self.data.order.name != "permutation":
            raise ValueError(
                f"data.order: {self.data.order.name}: a mixture (data.train with weight or epochs) has an order of its "
                "own: set data.order: permutation"
            )
        parts = (self.data, self.data.order, self.optim, self.loss, self.evaluation, self.train, self.run.trackers)
        for section in (self.model, *parts):
            section.check(self)
            for name, settings in section.chosen().items():
                settings.check(self)
                for key, value in settings.implied().items():
                    self._imply(key, value, name)
        return self

    def _imply(self, key: str, value: Any, name: str) -> None:
        part, _, field = key.partition(".")
        there = getattr(getattr(self, part), field)
        if there not in (None, value):
            raise ValueError(f"{key}: {there} contradicts {name}, from which {key}: {value} follows: remove {key}")
        if there is None:  # past validation, which would run again
            self.__dict__[part] = getattr(self, part).changed(**{field: value})
