"""A rank's sign of life for the agent that started it (fastft.launch): the step it is at, and when it last took one."""

from fastft.launch import protocol


class Heartbeat:
    """Writes to the file that the agent names; does nothing where no agent asks."""

    def __init__(self) -> None:
        self.file = protocol.open_beat()

    def beat(self, step: int) -> None:
        """About a microsecond. To be called wherever work goes on: after a step, a batch of an evaluation, a save."""
        if self.file is not None:
            protocol.write_beat(self.file, step)

    def rest(self) -> None:
        """What follows (an export, the end) takes as long as it takes."""
        self.beat(protocol.UNWATCHED)
