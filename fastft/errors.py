"""The one error class for everything a user did or can mend; the command line prints it on one screen, without a traceback."""

import difflib
from collections.abc import Iterable


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the nearest of the known names, or lists them all when none is near."""
    known = sorted(known)
    if not known:
        return ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}? Known: {', '.join(known)}."
    return f"Known: {', '.join(known)}."
