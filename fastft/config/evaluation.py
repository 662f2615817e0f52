"""The section of evaluations that every run has."""

from pydantic import Field

from fastft.config.base import Section


class Evaluation(Section):
    """What evaluations measure and keep; each task adds its own."""

    worst: int = Field(
        50,
        ge=0,
        description="Rows with the largest errors, of the last evaluation of each set, in <run.dir>/errors/SET.jsonl; "
        "0: no such file. For tasks that judge single rows.",
    )
    bootstrap: int = Field(
        0,
        ge=0,
        description="Resamples for a 95 % interval of each metric, which the records of evaluations then have; fastft "
        "eval takes 1000 where it is 0.",
    )
