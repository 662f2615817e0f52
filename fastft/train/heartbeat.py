"""A rank's sign of life for the agent that started it (fastft.launch): the step it is at, and when it last took one."""

import os
import time

from fastft.launch.agent import BEAT


class Heartbeat:
    """Writes to the file that FASTFT_HEARTBEAT names; does nothing where no agent asks."""

    def __init__(self):
        path = os.environ.get("FASTFT_HEARTBEAT")
        self.file = os.open(path, os.O_WRONLY) if path else None

    def beat(self, step: int) -> None:
        """About a microsecond. To be called wherever work goes on: after a step, a batch of an evaluation, a save."""
        if self.file is not None:
            os.pwrite(self.file, BEAT.pack(step, time.time()), 0)

    def rest(self) -> None:
        """What follows (an export, the end) takes as long as it takes."""
        self.beat(-1)
