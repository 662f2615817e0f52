"""Columns of a split while it is being prepared, and after: one file per column, appended without holding it in
memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastft.data.prepared import OriginsWriter, Ragged, RaggedWriter

RAGGED = "ragged:"


class Store:
    """Where examples go.

    Attributes
    ----------
    extras : list of (where, object)
        What the encoder kept beside the columns.
    starts : list of int
        The example at which each source begins; packs do not cross them. Sources that are read as one: 0 alone.
    """

    def __init__(self, folder: Path, columns: dict[str, str]):
        self.folder, self.extras = folder, list[tuple[str, Any]]()
        self.examples, self.starts = 0, list[int]()
        self._ragged = {
            name: RaggedWriter(folder, name, kind.removeprefix(RAGGED))
            for name, kind in columns.items()
            if kind.startswith(RAGGED)
        }
        self._scalars = {name: (kind, list[Any]()) for name, kind in columns.items() if name not in self._ragged}
        self._origins = OriginsWriter(folder)
        self._closed: dict[str, Ragged] = {}

    def append(self, where: str, columns: dict[str, Any], extra: Any) -> None:
        for name, ragged in self._ragged.items():
            ragged.append(columns[name])
        for name, (_, values) in self._scalars.items():
            values.append(columns[name])
        self._origins.append(where)
        if extra is not None:
            self.extras.append((where, extra))
        self.examples += 1

    def close(self) -> list[str]:
        """No more examples; returns the names of the files that they came from."""
        self._closed = {name: writer.close() for name, writer in self._ragged.items()}
        for name, (kind, values) in self._scalars.items():
            self.write(name, np.asarray(values, dtype=kind))
        return self._origins.close()

    def ragged(self, name: str) -> Ragged:
        """A column of sequences, once closed."""
        return self._closed[name]

    def write(self, name: str, values: np.ndarray) -> None:
        """A column with a row per sample."""
        np.save(self.folder / f"{name}.npy", values)

    def write_ragged(self, name: str, rows: Iterable[Iterable[int]], dtype: str = "<i4") -> Ragged:
        """A column of sequences with a row per sample."""
        writer = RaggedWriter(self.folder, name, dtype)
        for row in rows:
            writer.append(row)
        return writer.close()

    def write_flat(self, name: str, values: np.ndarray, lengths: np.ndarray, dtype: str = "<i4") -> Ragged:
        """A column of sequences, of which all values are there, one behind the other."""
        writer = RaggedWriter(self.folder, name, dtype)
        writer.extend(values, lengths)
        return writer.close()

    def dtypes(self) -> dict[str, str]:
        """Of the ragged columns that are not int32."""
        return {name: w.dtype.str for name, w in self._ragged.items() if w.dtype != RaggedWriter.DEFAULT}
