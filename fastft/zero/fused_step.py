"""The optimizer step under DeepSpeed ZeRO 1, 2 and 3 in one pass over memory.

DeepSpeed casts the reduced gradients to float32, multiplies them by the clipping factor, runs Adam and copies the
result to bfloat16: four passes, 6 + 8 + 28 + 6 = 48 bytes per parameter, after a gradient norm that makes float64
copies (another 18) and an overflow check that reads twice. Here Adam's kernel reads the bfloat16 gradients where they
lie, scales them, and writes master, state and the bfloat16 weights: 28 bytes, after a norm of 2, whose being finite
is the overflow check.

It is a seam over methods of DeepSpeed's ZeRO optimizers. Whether they still are those it was written against is
decided by a fingerprint of their source, not by a version number; where they are not, or where a feature is in use
that the seam does not cover, DeepSpeed's own step runs, with FusedAdamW as its optimizer, and `install` says why.
"""

import hashlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastft.ops import sum_squares
from fastft.optim.adamw import FusedAdamW
from fastft.optim.optimizers.base import ClientOptimizer

# What the seam replaces or leans on, and the SHA-256 of its source in DeepSpeed 0.19.8.
METHODS = {
    "DeepSpeedZeroOptimizer": [
        "step",
        "_optimizer_step",
        "unscale_and_clip_grads",
        "scaled_global_norm",
        "get_grad_norm_direct",
        "complete_grad_norm_calculation_for_cpu_offload",
        "get_flat_partition",
        "_update_scale",
        "check_overflow",
        "_get_preflattened_grad_partition",
        "_release_preflattened_grad_buffers",
        "free_grad_in_param_list",
        "reset_cpu_buffers",
        "_lazy_init_hp_params_optimizer_state",
        "_update_model_bit16_weights",
        "zero_grad",
        "_wait_for_offload_copies",
    ],
    "DeepSpeedZeroOptimizer_Stage3": [
        "step",
        "_optimizer_step",
        "unscale_and_clip_grads",
        "get_grad_norm_direct",
        "complete_grad_norm_calculation_for_cpu_offload",
        "_get_norm_groups",
        "_prepare_sub_group",
        "_prepare_fp32_grad_for_sub_group",
        "_reassign_or_swap_out_partitioned_parameters",
        "_unflatten_partitioned_parameters",
        "_release_sub_group",
        "_overflow_check_and_loss_scale_update",
        "_loss_scale_update_and_overflow_cleanup",
    ],
}
TESTED = {
    "DeepSpeedZeroOptimizer": "a3460c46b5646e50c9255cacb088815510aecf47b6e86ce60b1b0d66a4dbb08e",
    "DeepSpeedZeroOptimizer_Stage3": "67560e8988cd786d87be5a724612d40174fb8c19ac95544407609f1dc68a02c4",
}


def install(engine, optimizer: ClientOptimizer) -> str:
    """Make the engine's ZeRO step the fused one.

    Returns "" when it was done, else why DeepSpeed's own step stays (one sentence, for the log and the run's record).
    """
    zero = engine.optimizer
    reason = why_not(zero, optimizer)
    if not reason:
        seam = _Stage3 if type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3" else _Stage12
        assert isinstance(optimizer, FusedAdamW)
        seam(zero, optimizer).attach()
    return reason


def why_not(zero, optimizer: Any) -> str:
    """Why the fused step cannot stand in for this ZeRO optimizer's; "" when it can."""
    name = type(zero).__name__
    if name not in METHODS:
        return f"{name} is no ZeRO optimizer of stage 1, 2 or 3"
    if fingerprint(type(zero)) != TESTED[name]:
        import deepspeed

        return f"DeepSpeed {deepspeed.__version__}'s {name} is not the one the fused step was tested with"
    if not hasattr(optimizer, "step_flat") or zero.optimizer is not optimizer:
        return f"the client optimizer is {type(zero.optimizer).__name__}"
    left_out = {
        "float16 (its loss scale changes from step to step)": zero.dtype == torch.float16,
        "bfloat16 masters (optim.master)": optimizer.stochastic_rounding or optimizer.remainder,
        "a loss scale": zero.loss_scale != 1.0,
        "tensor or pipeline parallelism": zero.model_parallel_group is not None
        and dist.get_world_size(zero.model_parallel_group) > 1,
        "Muon": getattr(zero, "use_muon", False),
        "ZenFlow": bool(getattr(zero, "zenflow", False)),
        "torch.autocast's gradient scaler": getattr(zero, "torch_autocast_gradscaler", None) is not None,
        "mixture of experts": getattr(zero, "has_moe_layers", False),
        "optimizer state on NVMe": getattr(zero, "swap_optimizer", False),
        "partial offload": getattr(zero, "offload_optimizer", False) and zero.partial_offload != 1.0,
        "bfloat16 without check_grad_overflow": zero.dtype == torch.bfloat16
        and not getattr(zero, "check_grad_overflow", True),
        "compute_grad_norm: false": not getattr(zero, "compute_grad_norm", True),
    }
    used = [feature for feature, in_use in left_out.items() if in_use]
    return f"it does not cover {used[0]}" if used else ""


def fingerprint(cls: type) -> str:
    """SHA-256 of the source of the methods that the seam depends on; "" when their source cannot be read."""
    try:
        source = "".join(inspect.getsource(getattr(cls, name)) for name in METHODS[cls.__name__])
    except (AttributeError, OSError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()


class _Seam:
    """What both stages share."""

    def __init__(self, zero, optimizer: FusedAdamW):
        self.zero, self.optimizer = zero, optimizer

    def replace(self, *methods: Callable) -> None:
        """Put methods of this object in place of the ZeRO optimizer's of the same names."""
        for method in methods:
            setattr(self.zero, method.__name__, method)

    def scale_of(self, norm: Tensor) -> Tensor | None:
        """1 / DeepSpeed's combined scale, as it computes it: min(1, clip_grad / (norm + 1e-6)). None: nothing to
        scale.
        """
        if self.zero.clip_grad <= 0.0:
            return None
        return 1.0 / torch.clamp((norm + 1e-6) / self.zero.clip_grad, min=1.0)


class _Stage12(_Seam):
    """DeepSpeedZeroOptimizer: stages 1 and 2."""

    def attach(self) -> None:
        self.replace(self.step, self.get_grad_norm_direct, self.complete_grad_norm_calculation_for_cpu_offload)

    def complete_grad_norm_calculation_for_cpu_offload(self, params: list[Tensor]) -> Tensor:
        """As without offload, where DeepSpeed adds up norms of single parameters in float32: others in the last
        digits.
        """
        i = next(i for i, own in enumerate(self.zero.params_in_partition) if own is params)
        return self.get_grad_norm_direct([self.zero.single_partition_of_fp32_groups[i].grad], params)

    def get_grad_norm_direct(self, gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        """L2 norm of this group's gradients over all ranks, 0-dim float32; -1 when one is NaN or Inf (DeepSpeed's
        convention).
        """
        from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

        zero = self.zero
        total = sum_squares([g for g in gradients if not getattr(g, "_zero_padding", False)]).float().to(zero.device)
        dist.all_reduce(total, group=zero.dp_process_group)
        total = total.sqrt()
        mask_nan_or_inf_with_val_inplace(total, device=zero.device)
        return total

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """DeepSpeedZeroOptimizer.step with its three passes per group made one."""
        from deepspeed.runtime.utils import all_gather_dp_groups, is_invalid_grad_norm
        from deepspeed.runtime.zero import stage_1_and_2

        zero = self.zero
        zero.micro_step_id = stage_1_and_2.INITIAL_MICRO_STEP_ID
        zero._wait_for_offload_copies()
        zero.overflow = False
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.check_overflow(partition_gradients=zero.partition_gradients)
        norm = None if zero.overflow else zero.scaled_global_norm()
        zero.overflow = norm is None or is_invalid_grad_norm(norm)
        zero._update_scale(zero.overflow)
        if zero.overflow:
            self._skip()
            return
        zero._global_grad_norm = norm
        assert norm is not None
        scale = self.scale_of(norm)
        zero.timers(stage_1_and_2.OPTIMIZER_STEP_TIMER).start()
        for i in range(len(zero.bit16_groups)):
            self._update(i, scale)
        zero.timers(stage_1_and_2.OPTIMIZER_STEP_TIMER).stop()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        zero.timers(stage_1_and_2.OPTIMIZER_ALLGATHER_TIMER).start()
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        zero.timers(stage_1_and_2.OPTIMIZER_ALLGATHER_TIMER).stop()
        for i in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(i)

    def _update(self, i: int, scale: Tensor | None) -> None:
        zero = self.zero
        master = zero.single_partition_of_fp32_groups[i]
        weights = zero.parallel_partitioned_bit16_groups[i][dist.get_rank(group=zero.real_dp_process_group[i])]
        if zero.cpu_offload:
            grads = [master.grad]
        else:
            zero.free_grad_in_param_list(zero.params_not_in_partition[i])
            flat = zero._get_preflattened_grad_partition(i)
            grads = zero.averaged_gradients[i] if flat is None else [flat]
        out = weights if weights.device == master.device else zero.param_buffer_of_bit16_for_cpu_offload_groups[i]
        one = out.data_ptr() == master.data_ptr()  # the weights are the masters
        self.optimizer.step_flat(
            zero.optimizer.param_groups[i], master, _joined(grads), out=None if one else out.data, grad_scale=scale
        )
        if out is not weights:
            weights.data.copy_(out.data, non_blocking=True)
        zero._lazy_init_hp_params_optimizer_state()
        del grads
        if not zero.cpu_offload:
            zero.free_grad_in_param_list(zero.params_in_partition[i])
            zero.all_grad_tensors[i] = None
        zero._release_preflattened_grad_buffers(i)
        zero.averaged_gradients[i] = None

    def _skip(self) -> None:
        """NaN or Inf gradients: drop them and change nothing."""
        zero = self.zero
        zero._global_grad_norm = float("inf")
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            return
        for i in zero.averaged_gradients:
            zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None


class _Stage3(_Seam):
    """DeepSpeedZeroOptimizer_Stage3, whose step is already made of methods: five of them are replaced."""

    def __init__(self, zero, optimizer: FusedAdamW):
        super().__init__(zero, optimizer)
        self.grads: list[Tensor] = []  # of the sub-group in hand
        self.scale: Tensor | None = None
        self.stored = False  # whether the kernel has written the sub-group's weights

    def attach(self) -> None:
        self.copy_weights = types.MethodType(type(self.zero)._reassign_or_swap_out_partitioned_parameters, self.zero)
        self.replace(
            self.get_grad_norm_direct,
            self.complete_grad_norm_calculation_for_cpu_offload,
            self._prepare_fp32_grad_for_sub_group,
            self.unscale_and_clip_grads,
            self._optimizer_step,
            self._reassign_or_swap_out_partitioned_parameters,
        )

    def get_grad_norm_direct(self, gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        """L2 norm of this sub-group's gradients over all ranks, 0-dim float64; -1 when one is NaN or Inf (DeepSpeed's
        convention).
        """
        zero = self.zero
        total = sum_squares(_joined(gradients)).to(zero.device)
        dist.all_reduce(total, group=zero._get_param_partition_group(params[0]))
        return torch.where(total.isfinite(), total.sqrt(), torch.full_like(total, -1.0))

    def complete_grad_norm_calculation_for_cpu_offload(self, params: list[Tensor]) -> Tensor:
        """As without offload, where DeepSpeed's is a float32."""
        i = next(i for i, own in enumerate(self.zero.fp16_groups) if own is params)
        return self.get_grad_norm_direct([self.zero.fp32_partitioned_groups_flat[i].grad], params)

    def _prepare_fp32_grad_for_sub_group(self, sub_group: int) -> None:
        """Keep the gradients as they are, instead of a flat float32 copy."""
        self.grads = self.zero.averaged_gradients[sub_group]
        self.zero.averaged_gradients[sub_group] = None

    def unscale_and_clip_grads(self, sub_group: int, total_norm: Tensor) -> None:
        """Remember the factor, instead of multiplying by it."""
        scale = self.scale_of(total_norm)
        self.scale = None if scale is None else scale.float()

    @torch.no_grad()
    def _optimizer_step(self, sub_group: int) -> None:
        zero = self.zero
        master, weights = zero.fp32_partitioned_groups_flat[sub_group], zero.fp16_partitioned_groups_flat[sub_group]
        grads = [master.grad] if zero.offload_optimizer else self.grads
        self.grads = []
        there = weights is not None and weights.device == master.device
        one = there and weights.data_ptr() == master.data_ptr()  # the weights are the masters
        self.stored = there
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[sub_group]]
        self.optimizer.step_flat(
            group, master, _joined(grads), out=weights.data if there and not one else None, grad_scale=self.scale
        )

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group: int) -> None:
        if self.stored:
            self.zero._unflatten_partitioned_parameters(sub_group)
        else:  # weights on another device than their master, or paged out
            self.copy_weights(sub_group)


def _joined(tensors: list[Tensor]) -> list[Tensor]:
    """The same elements in the same order as 1-D tensors, neighbours in memory made one: one of 100 M elements, say,
    instead of 200.
    """
    joined: list[Tensor] = []
    for tensor in tensors:
        tensor = tensor.detach().reshape(-1)
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.dtype == tensor.dtype
            and last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            and last.storage_offset() + last.numel() == tensor.storage_offset()
        ):
            joined[-1] = last.as_strided((last.numel() + tensor.numel(),), (1,), last.storage_offset())
        else:
            joined.append(tensor)
    return joined
