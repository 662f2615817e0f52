"""SIGINT and SIGTERM ask the loop to save and leave; a second SIGINT leaves at once."""

import signal

import torch
import torch.distributed as dist

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers a signal until every rank has agreed on it at the end of a step.

    Used as a context manager: the handlers that were there before come back afterwards.
    """

    def __init__(self):
        self.signum = 0

    def __enter__(self) -> "StopRequest":
        self.before = {s: signal.signal(s, self._catch) for s in CAUGHT}
        return self

    def __exit__(self, *exc) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _catch(self, signum: int, frame) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signum = signum

    @staticmethod
    def any(here: bool, device: torch.device, world: int) -> bool:
        """Whether it holds on any rank."""
        if world == 1:
            return here
        seen = torch.tensor([here], dtype=torch.int32, device=device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen.item())

    def agreed(self, device: torch.device, world: int, failed: bool) -> tuple[int, bool]:
        """The signal that any rank has seen (0: none), and whether any rank has failed: the same on all ranks."""
        if world == 1:
            return self.signum, failed
        seen = torch.tensor([self.signum, failed], dtype=torch.int32, device=device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        signum, failures = seen.tolist()
        return signum, bool(failures)
