"""Named tables that new tasks, data formats and schedules register themselves in."""

from typing import Generic, TypeVar

from fastft.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """name -> entry; a duplicate is a programming error, an unknown name a user's mistake that lists what is known."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str):
        def keep(entry: T) -> T:
            if name in self._entries:
                raise RuntimeError(f"{self.kind} {name!r} is registered twice: {self._entries[name]!r} and {entry!r}")
            self._entries[name] = entry
            return entry

        return keep

    def get(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(f"Unknown {self.kind} {name!r}.", did_you_mean(name, self._entries))
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)
