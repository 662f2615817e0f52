"""DeepSpeed's checkpoint files as copies in host memory, for whoever writes them later."""

import copy
from collections import OrderedDict
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from fastft.mapped import is_mapped
from fastft.zero import state_files


class Snapshots(CheckpointEngine):
    """DeepSpeed's place for writing files: keeps copies of what it is given instead, in host memory."""

    def __init__(self):
        super().__init__()
        self.taken: dict[str, object] = {}  # path -> state
        self.kept: set[str] | None = None  # names of the module's state that are saved; None: all

    def create(self, info) -> None:
        pass

    def save(self, state_dict, path: str) -> None:
        module = state_dict.get("module")
        if module is not None and self.kept is not None:
            kept = OrderedDict((name, value) for name, value in module.items() if name in self.kept)
            state_dict = {**state_dict, "module": kept}
        self.taken[path] = _copied(state_dict)

    def load(self, path: str, map_location=None):
        raise NotImplementedError("restoring.py reads checkpoints")

    def commit(self, info) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False  # DeepSpeed would copy once more to cut views loose; ours are cut already

    def take(self) -> dict[str, object]:
        taken, self.taken = self.taken, {}
        return {str(Path(path).with_suffix(state_files.SUFFIX)): state for path, state in taken.items()}


def _copied(value):
    """A copy with every tensor in host memory of its own; one that lies in a file stays there, and is written before
    the training goes on.
    """
    if torch.is_tensor(value):
        if is_mapped(value):
            return value.detach()
        return value.detach().to("cpu", copy=True).contiguous()
    if type(value) in (dict, OrderedDict):
        copied = type(value)((k, _copied(v)) for k, v in value.items())
        if hasattr(value, "_metadata"):  # versions of a module's state
            copied._metadata = value._metadata
        return copied
    if type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    return copy.deepcopy(value)


def bytes_of(value) -> int:
    """Bytes of all tensors in it."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def snapshot(engine, scratch: str, tag: str, adapter_only: bool = False) -> dict[str, object]:
    """What DeepSpeed would write of this rank's state under ``scratch``: path -> state. All ranks take part.

    ``adapter_only``: leave frozen parameters out.
    """
    if not isinstance(engine.checkpoint_engine, Snapshots):
        engine.checkpoint_engine = Snapshots()
        engine._copy_recovery_script = lambda folder: None  # DeepSpeed's program, which reads its own files alone
    if adapter_only:
        engine.checkpoint_engine.kept = _of_adapter(engine.module)
    engine.save_checkpoint(scratch, tag=tag, save_latest=False, exclude_frozen_parameters=adapter_only)
    return engine.checkpoint_engine.take()


def _of_adapter(module) -> set[str]:
    """Names that the checkpoint of an adapter has of the module's state; not what a quantized base adds to it."""
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return trained | {name for name, _ in module.named_buffers(remove_duplicate=False)}
