"""Parquet, row group by row group, through pyarrow. ``.parquet.gz`` is decompressed to memory first."""

import io
from pathlib import Path

from fastft.data.formats.base import decompressed, reader, rows_of_batch
from fastft.errors import UserError


@reader("parquet", ".parquet", ".pq")
def read(path, source):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = getattr(path, "rows", 65536)  # decoded at a time
    with open(path, "rb") if isinstance(path, Path) else path.open_raw() as f, decompressed(f, path) as content:
        opened = f if content is f else io.BytesIO(content.read())
        yield from _rows(path, opened, rows, pa, pq)


def _rows(path, opened, rows, pa, pq):
    try:
        file = pq.ParquetFile(opened)
        names = file.schema_arrow.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{path}: a column name appears twice: {', '.join(sorted(twice))}.", "Rename one.")
        row = 0
        for batch in file.iter_batches(batch_size=rows):
            for record in rows_of_batch(batch):
                row += 1
                yield f"{path}:row {row}", record
    except pa.ArrowException as e:
        raise UserError(f"{path}: not a valid Parquet file: {e}") from None
