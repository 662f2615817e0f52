"""What the command line ends with: a mistake that a user can fix (one screen, no traceback), or a signal."""

import difflib
import errno
import signal
from collections.abc import Iterable

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)  # of a write, where Python names no file


class UserError(ValueError):
    """What is wrong (naming the file, row or key) and what to do about it.

    Parameters
    ----------
    message : str
        What is wrong and where.
    hint : str, optional
        What the user can do about it.
    """

    def __init__(self, message: str, hint: str = ""):
        self.message = message
        self.hint = hint
        super().__init__(f"{message}\n{hint}" if hint else message)

    def __reduce__(self) -> tuple:
        return type(self), (self.message, self.hint)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: a user's mistake needs no traceback."""
        return f"{type(self).__name__}: {self}".splitlines()


class Interrupted(Exception):
    """A signal ended the run early; the checkpoint is written.

    ``exit_code`` is the shell's convention, 128 + signal.
    """

    def __init__(self, signum: int, step: int, run_dir: str):
        self.exit_code = 128 + signum
        super().__init__(
            f"{signal.Signals(signum).name}: saved at step {step} and stopped. Continue with: fastft resume {run_dir}"
        )

    def _render_traceback_(self) -> list[str]:
        """What IPython shows, as for UserError."""
        return [f"{type(self).__name__}: {self}"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the nearest of the known names, or lists them all when none is near."""
    known = sorted(known)
    if not known:
        return ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}? Known: {', '.join(known)}."
    return f"Known: {', '.join(known)}."
