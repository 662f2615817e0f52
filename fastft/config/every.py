"""How often: a number of steps, an epoch, or a time."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
EXPECTED = "expected a number of steps (200), epoch, a number of epochs (0.5 epochs), or a time (90s, 30m, 2h)"


@dataclass(frozen=True)
class Interval:
    """One of the three is set."""

    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None


def interval(value: int | str) -> Interval:
    """What ``every`` values mean. Raises ValueError for other text."""
    if isinstance(value, int):
        return Interval(steps=value)
    text = value.strip().lower()
    if found := re.fullmatch(r"(?:([0-9]*\.?[0-9]+)\s*)?epochs?", text):
        number, unit = float(found[1] or 1), "epochs"
    elif (found := re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]+)", text)) and found[2] in SECONDS:
        number, unit = float(found[1]) * SECONDS[found[2]], "seconds"
    else:
        raise ValueError(f"{value!r}: {EXPECTED}")
    if number <= 0:
        raise ValueError(f"{value!r} is never: {EXPECTED}")
    return Interval(epochs=number) if unit == "epochs" else Interval(seconds=number)


def _checked(value: Any) -> Any:
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"[0-9]+", value.strip()) else value
        if isinstance(value, str):
            interval(value)
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(EXPECTED)
    return value


Steps = Annotated[int, Field(ge=1)]
Written = Annotated[str, Field(pattern=r"^ *([0-9]*\.?[0-9]+ *(s|m|min|h|d)|([0-9]*\.?[0-9]+ *)?[Ee]pochs?) *$")]
Every = Annotated[Steps | str, BeforeValidator(_checked, json_schema_input_type=Steps | Written)]
