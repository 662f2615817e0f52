"""Standard output is for what was asked for; what libraries say goes to standard error."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def results_only() -> Iterator[None]:
    """While inside, what is written on standard output, by Python, a library's C++ or a process that it starts (a
    compiler), goes to standard error.
    """
    if sys.stdout is None:  # it was closed before we began
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)
