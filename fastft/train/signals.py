"""SIGINT and SIGTERM ask the loop to save and leave; a second SIGINT leaves at once."""

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers a signal until every rank has agreed on it at the end of a step.

    Used as a context manager: the handlers that were there before come back afterwards. In a thread that is not the
    main one Python takes no handlers, and signals stay whose they were.

    Attributes
    ----------
    say : callable
        Takes the text that acknowledges a signal as it comes; called in a thread of its own, for a handler may
        interrupt whatever holds a stream.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "StopRequest":
        ours = CAUGHT if threading.current_thread() is threading.main_thread() else ()
        self.before: dict[signal.Signals, Any] = {s: signal.signal(s, self._catch) for s in ours}
        return self

    def __exit__(self, *exc) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _catch(self, signum: int, frame) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        if not self.signum:
            again = "; again: end now" if signum == signal.SIGINT else ""
            text = f"{signal.Signals(signum).name}: stopping after this step and saving{again}"
            threading.Thread(target=self.say, args=(text,), daemon=True).start()
        self.signum = signum
