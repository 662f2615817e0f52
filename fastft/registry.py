"""Named tables whose members are files of one folder, each imported when its name is first asked for."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from fastft.errors import UserError, did_you_mean

T = TypeVar("T")
SHARED = ("base",)  # files of a folder that are no members of its table, beside those that begin with an underscore


class Registry(Generic[T]):
    """name -> entry; a duplicate is a programming error, an unknown name a user's mistake that lists what is known.

    Parameters
    ----------
    kind : str
        What an entry is, for messages.
    package : str, optional
        Folder of the members: ``get("x")`` imports ``<package>.x``, a file or a folder, which registers itself under
        that name. Files that begin with an underscore, and base.py, hold what the members share.
    """

    def __init__(self, kind: str, package: str | None = None):
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def keep(entry: T) -> T:
            if name in self._entries:
                raise RuntimeError(f"{self.kind} {name!r} is registered twice: {self._entries[name]!r} and {entry!r}")
            self._entries[name] = entry
            return entry

        return keep

    def get(self, name: str) -> T:
        """Raises UserError for an unknown name."""
        if name not in self._entries and name in self._files():
            importlib.import_module(f"{self.package}.{name}")
            if name not in self._entries:
                raise RuntimeError(f"{self.package}.{name} does not register the {self.kind} {name!r}")
        if name not in self._entries:
            raise UserError(f"Unknown {self.kind} {name!r}.", did_you_mean(name, self.names()))
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted({*self._entries, *self._files()})

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._files()

    def _files(self) -> list[str]:
        if self.package is None:
            return []
        spec = importlib.util.find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        names = (module.name for module in pkgutil.iter_modules(folders))
        return [name for name in names if not name.startswith("_") and name not in SHARED]
