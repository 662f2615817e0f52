"""Parquet, row group by row group, through pyarrow. ``.parquet.gz`` is decompressed to memory first."""

import gzip
import io

from fastft.data.formats.base import reader, rows_of_batch
from fastft.errors import UserError


@reader("parquet", ".parquet", ".pq")
def read(path, source):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(path, "rb") as f:
        zipped = f.read(2) == b"\x1f\x8b"
    opened = io.BytesIO(gzip.decompress(path.read_bytes())) if zipped else path
    try:
        file = pq.ParquetFile(opened)
        names = file.schema_arrow.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{path}: a column name appears twice: {', '.join(sorted(twice))}.", "Rename one.")
        row = 0
        for batch in file.iter_batches():
            for record in rows_of_batch(batch):
                row += 1
                yield f"{path}:row {row}", record
    except pa.ArrowException as e:
        raise UserError(f"{path}: not a valid Parquet file: {e}") from None
