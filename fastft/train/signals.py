"""SIGINT and SIGTERM ask the loop to save and leave; a second SIGINT leaves at once."""

import os
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
    obeyed : bool
        Of the class: whether a signal has been taken in this process.
    say : callable
        Takes the text that acknowledges a signal as it comes; called in a thread of its own, for a handler may
        interrupt whatever holds a stream.
    """

    obeyed = False

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
        StopRequest.obeyed = True


def end_with_run() -> None:
    """For a process that ends with the run it trains: once a signal was obeyed, SIGTERM does nothing more.

    The end of a job often comes to a rank twice, from whoever ends all processes of the job and from the launcher that
    passes it on. The second may come late, when all is saved but not yet said.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame) -> None:
    if not StopRequest.obeyed:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
