"""SIGINT and SIGTERM ask the loop to save and leave; a second SIGINT leaves at once."""

import signal

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
