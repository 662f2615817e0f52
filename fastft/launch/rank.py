"""What a rank owes the agent that started it: to die with it, and to tell its stacks on SIGUSR1."""

import ctypes
import faulthandler
import os
import signal
import sys

from fastft.launch import protocol

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def settle() -> None:
    """To be called first thing in a process that finds protocol.AGENT in its environment."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[protocol.AGENT]):  # it went before the call
        os._exit(1)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # runs in C: also while a collective blocks the interpreter
