"""Python's garbage collector during training."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_collector() -> Iterator[None]:
    """While inside, Python's garbage collector leaves out what exists now: to look at every object of torch and
    transformers takes longer than a step on a GPU (0.16 to 0.24 s, measured).
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
