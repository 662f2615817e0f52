"""Process group and DeepSpeed engine: what the loop needs to know of DeepSpeed is here."""

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastft.config import Config, Parallel
from fastft.errors import UserError
from fastft.files import digest
from fastft.ops import sum_squares
from fastft.optim import set_offset
from fastft.optim.optimizers.base import ClientOptimizer
from fastft.ranks import Ranks
from fastft.zero import fused_step, rings, views
from fastft.zero.bucket import with_bucket
from fastft.zero.on_disk import onto_disk, state_onto_disk
from fastft.zero.parameters import whole_shape
from fastft.zero.unused import Unused

log = logging.getLogger(__name__)

WAITED = 15.0  # seconds until a rank says that it waits for others


def start_process_group() -> None:
    """Join the process group through DeepSpeed (gloo on CPUs, NCCL on GPUs), quietly."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory all-reduce here (a compiler, half a minute) that only its inference path
    # calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if on_cpu:
        _accelerate_with_cpu()
    if not torch.distributed.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        with _said_while_waiting():
            try:
                deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
            except torch.distributed.DistNetworkError as e:
                if "EADDRINUSE" not in str(e):
                    raise
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise UserError(
                    f"{where}: the port is taken by another process.",
                    "Choose another port (MASTER_PORT, --master-port).",
                ) from None
    if on_cpu:
        rings.install()


def _accelerate_with_cpu() -> None:
    """Have DeepSpeed use the CPU also where it has seen a GPU.

    It chooses once, when it is first imported, which is before a configuration is read; DS_ACCELERATOR then comes too
    late, and its engine would take the model to the GPU while the batches stay behind.
    """
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())


@contextmanager
def _said_while_waiting() -> Iterator[None]:
    """Say whom this process waits for, when the others do not come."""
    env, over = os.environ, threading.Event()

    def say() -> None:
        waited = 0.0
        for pause in itertools.chain([WAITED], itertools.repeat(60.0)):
            if over.wait(pause):
                return
            waited += pause
            log.warning(
                "rank %s has waited %.0f s for the others of %s ranks at %s:%s (RANK, WORLD_SIZE, MASTER_ADDR and "
                "MASTER_PORT of the environment say so)",
                env["RANK"],
                waited,
                env["WORLD_SIZE"],
                env["MASTER_ADDR"],
                env["MASTER_PORT"],
            )

    if env["WORLD_SIZE"] != "1":
        threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def release(engine: Any) -> None:
    """Let go of what holds an engine and its parameters when the run is over: hooks of gradients, which autograd holds,
    and at ZeRO 3 a list and the cache of a method, which DeepSpeed's modules hold.
    """
    for hook in getattr(engine.optimizer, "_grad_acc_hooks", ()):
        hook.remove()
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

        own, called = set(engine.module.modules()), parameter_offload.FWD_MODULE_STACK
        called[:] = [module for module in called if module not in own]  # several where a forward has died
        for method in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
            for cell in getattr(method, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


def stop_process_group() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def check_layers(model: Any, config: Config, ranks: Ranks) -> None:
    """UserError for layers that are left out at random (LayerDrop) where ranks must take the same ones: they reduce and
    gather what they hold in one order, and would wait for each other for ever or sum different layers.
    """
    found = [name for name in LAYERDROP if getattr(model.config, name, 0)]
    if found and config.parallel.zero and not ranks.alone:
        raise UserError(
            f"{type(model).__name__}: {found[0]} = {getattr(model.config, found[0])} drops other layers on every rank, "
            f"which ZeRO {config.parallel.zero} cannot do.",
            f"Set {found[0]} to 0 in the model's config.json, or parallel.zero: 0.",
        )


def layout(model: torch.nn.Module, optimizer: ClientOptimizer) -> str:
    """A digest of the trained parameters in the optimizer's order, by group: what a flat shard's positions mean."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return digest([[[names[p], list(whole_shape(p))] for p in group["params"]] for group in optimizer.param_groups])


def build_engine(
    model: torch.nn.Module,
    optimizer: ClientOptimizer,
    settings: dict,
    parallel: Parallel | None = None,
):
    """A DeepSpeed engine over the model with our optimizer as its client optimizer.

    Its attribute ``fastft_step`` says how the ZeRO step runs: "fused", or "unfused: " and the reason.
    """
    import deepspeed

    parallel = parallel or Parallel()
    settings = with_bucket(model, settings)
    # Stage 0 in bf16 calls step() once on zero gradients while it sets itself up: weights would decay before training.
    # The sharded stages need that call for nothing either: ClientOptimizer makes its state at the first real step.
    with optimizer.steps_suspended():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if engine.zero_optimization_stage() == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = (
            False  # one rank: it would flatten and copy every gradient to reduce it with nobody
        )
    if engine.zero_optimization_stage() == 3:
        _clear_padding(engine.optimizer)
        if not parallel.activation_checkpointing:  # which keeps a layer's alone
            views.keep_none(model)
        views.need_gradients(model)
    if engine.zero_optimization_stage():
        _held_once(engine.optimizer)
    if parallel.offload_dir is not None:
        onto_disk(engine.optimizer, Path(parallel.offload_dir), parallel.offload == "parameters")
    _set_offsets(engine)
    reason = "parallel.fused_step: false"
    if parallel.fused_step:
        reason = (
            fused_step.install(engine, optimizer) if engine.zero_optimization_stage() else "stage 0 has no ZeRO step"
        )
        if reason and engine.zero_optimization_stage():
            log.warning("ZeRO step not fused: %s", reason)
    engine.fastft_step = f"unfused: {reason}" if reason else "fused"
    return engine


def build_forward_engine(model: torch.nn.Module, settings: dict):
    """A ZeRO-3 engine that computes forwards of a model in shards, and trains nothing; ``settings`` as for one that
    does.
    """
    import deepspeed

    needed = ("train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization", "steps_per_print")
    kept = {name: settings[name] for name in needed}
    if "bf16" in settings:
        kept["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, config=kept)
    return engine


def _clear_padding(zero) -> None:
    """Zero what pads the last shards of stage 3: DeepSpeed leaves it as the memory was found (NaN, at times), and it
    goes into checkpoints.
    """
    for flat, params in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        before = 0
        for param in params:
            size = param.partition_numel()
            padding = slice(min(max(param.ds_numel - size * param.ds_zero_partition_rank, 0), size), size)
            if param.ds_tensor.numel() == size:  # elsewhere (NVMe) it is not here
                param.ds_tensor[padding].zero_()
            if flat.numel() >= before + size:
                flat.data[before : before + size][padding].zero_()
            before += size


def _held_once(zero) -> None:
    """Let go of what ZeRO holds twice where nothing is offloaded.

    Weights of the masters' dtype are the masters: DeepSpeed clones them at stages 1 and 2, and at stage 3, where it
    means not to, it compares a device with its name. And the zeros that stage 3 has stepped on while it was made, as
    much as this rank's gradients, which have a place of their own, it holds until the first step.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        if zero.offload_optimizer or zero.swap_optimizer:
            return
        masters, weights = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
        for master in masters:
            master.grad = None
    elif zero.cpu_offload:
        return
    else:
        masters, groups = zero.single_partition_of_fp32_groups, zero.real_dp_process_group
        parts = zero.parallel_partitioned_bit16_groups
        weights = [own[torch.distributed.get_rank(group=group)] for own, group in zip(parts, groups, strict=True)]
    for master, weight in zip(masters, weights, strict=True):
        if weight is not None and (weight.dtype, weight.device) == (master.dtype, master.device):
            master.data = weight.data


def _set_offsets(engine) -> None:
    """Tell our optimizer where each flat shard begins, so that its random rounding differs from shard to shard.

    Stages 1 and 2 cut each group's flat tensor: rounding then does not depend on the number of ranks. Stage 3 cuts
    every parameter, and a flat shard holds a piece of each: the ranks get ranges of their own, and the rounding
    depends on how many there are.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        before = 0
        for group, (flat, params) in enumerate(
            zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
        ):
            rank = torch.distributed.get_rank(group=zero.real_dp_process_group[group])
            set_offset(flat, before + rank * flat.numel())
            before += sum(p.numel() for p in params)
    elif stage == 3:
        before = torch.distributed.get_rank() << 40
        for flat in zero.fp32_partitioned_groups_flat:
            set_offset(flat, before)
            before += flat.numel()


class Stepper:
    """Runs the engine's micro-steps, and its optimizer step with clipping and the NaN check fused in where DeepSpeed
    leaves it to us.

    Attributes
    ----------
    grad_norm : float or 0-dim tensor
        Global gradient norm of the last step, before clipping.
    """

    def __init__(self, engine, optimizer: ClientOptimizer, clip: float | None):
        self.engine, self.optimizer, self.clip = engine, optimizer, clip
        # Stage 0 without masters hands gradients straight to our optimizer, and checks nothing.
        self.fused_clip = engine.optimizer is optimizer
        self.unused = Unused(engine, optimizer)
        self.grad_norm: torch.Tensor | float = 0.0
        self.before_step: Callable[[], None] = lambda: None

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate; the last micro-step of an optimizer step also reduces gradients over the ranks."""
        self.engine.backward(loss, scale_wrt_gas=False)
        if last:
            self.before_step()
            self._step()

    def boundary(self, last: bool) -> None:
        """To be called before the forward of every micro-step: ZeRO's hooks read it."""
        self.engine.set_gradient_accumulation_boundary(last)

    def _step(self) -> None:
        unused = self.unused.take()
        if not self.fused_clip:
            with torch.no_grad(), self.unused.kept(unused):
                self.engine.step()
            state_onto_disk(self.optimizer)
            self.grad_norm = self.engine.get_global_grad_norm()
            return
        for param in unused:  # of several ranks DeepSpeed gave it zeros
            param.grad = None
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _total_norm(grads)
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else None
        with self.optimizer.scaled(grad_scale=scale, found_inf=(~norm.isfinite()).float()):
            self.engine.step()
        self.grad_norm = norm

    def skipped(self) -> bool | torch.Tensor:
        """Whether the last step changed nothing because of NaN or Inf gradients; on the device where it is known there
        alone: reading it waits.
        """
        if self.fused_clip:
            return ~torch.as_tensor(self.grad_norm).isfinite()
        return bool(getattr(self.engine.optimizer, "overflow", False))


def _total_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm of all gradients, 0-dim float32. torch's would round each tensor's norm to its dtype."""
    if any(grad.dtype == torch.bfloat16 for grad in grads):
        return sum_squares(grads).sqrt().float()
    return torch.nn.utils.get_total_norm(grads)
