"""What DeepSpeed logs: on standard error, for standard output is for results; without what no user can act on."""

import logging
import sys
import warnings

NOISE = (
    "Setting accelerator to CPU",  # said at every import on a machine without a GPU
    "**** You are using ZeRO with an untested optimizer",  # ours, which tests/train/test_equivalence.py tests
)


class _Logger(logging.Logger):
    """Keeps every handler off standard output: DeepSpeed gives its logger one that writes there when it is imported."""

    def addHandler(self, hdlr: logging.Handler) -> None:
        off_standard_output(hdlr)
        super().addHandler(hdlr)


def off_standard_output(handler: logging.Handler) -> None:
    """Have a handler that writes on standard output write on standard error."""
    if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.__stdout__):
        handler.setStream(sys.stderr)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


def settle() -> None:
    """To be called before DeepSpeed is imported; where it is already, what its logger has is changed."""
    before = logging.getLoggerClass()
    logging.setLoggerClass(_Logger)
    try:
        logger = logging.getLogger("DeepSpeed")
    finally:
        logging.setLoggerClass(before)
    for handler in logger.handlers:
        off_standard_output(handler)
    if _worth_saying not in logger.filters:
        logger.addFilter(_worth_saying)
    # Of collectives that DeepSpeed calls by names that torch has since replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
