"""Parquet dumps, a batch of rows at a time, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import FormatError

BATCH_BYTES = 16 << 20  # in memory, about; a row group may be larger than memory
MAX_BATCH_ROWS = 8192


def column_names(path: Path) -> list[str] | None:
    """The names of a Parquet file's columns; None for a file of another kind."""
    try:
        with pq.ParquetFile(path) as file:
            return list(file.schema_arrow.names)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None


def parquet_tables(path: Path) -> Iterator[pa.Table]:
    """The rows of a Parquet file, as tables of bounded size.

    Raises:
        FormatError: it is none, cut off, or damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata)):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a damaged column name
        raise FormatError(f"{path} is no complete Parquet file: {error}. Copy it again.") from error


def _batch_rows(metadata: pq.FileMetaData) -> int:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    row_bytes = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows), default=1)
    return int(min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // (2 * row_bytes + 1))))
