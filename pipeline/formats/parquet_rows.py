"""Parquet dumps, a batch of rows at a time, with errors that name the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import FormatError, said
from pipeline.formats.source_rows import SourceRow

BATCH_BYTES = 16 << 20  # in memory, about; a row group may be larger than memory
MAX_BATCH_ROWS = 8192
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}
_TEXT_GROWTH = 2  # the same text may stand once for many rows


def column_names(path: Path) -> list[str] | None:
    """The names of a Parquet file's columns; None for a file of another kind."""
    try:
        with pq.ParquetFile(path) as file:
            return list(file.schema_arrow.names)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None


def parquet_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[SourceRow]:
    """The rows of a Parquet file as they stand; arguments and errors are those of `parquet_tables`."""
    rows = (row for table in parquet_tables(path, columns) for row in table.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield SourceRow(f"{path.name}:{number}", row)


def parquet_tables(path: Path, columns: Collection[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a Parquet file, as tables of bounded size.

    Args:
        columns: the names to read, of which the file may lack some; None: all that it has.

    Raises:
        FormatError: it is none, cut off, or damaged, or two columns have one name.
    """
    with _opened(path) as file:
        names = file.schema_arrow.names
        read = None if columns is None else [name for name in names if name in columns]
        twice = [name for name, count in Counter(names if read is None else read).items() if count > 1]
        if twice:
            raise FormatError(
                f"{path} has several columns `{twice[0]}`. Keep one of them, or rename the others."
            )
        for batch in file.iter_batches(batch_size=_batch_rows(file.metadata), columns=read):
            yield pa.Table.from_batches([batch])


def bytes_in_memory(path: Path) -> int:
    """About what the rows of a Parquet file take, which encodings and compression make many times smaller.

    Raises:
        FormatError: it is none, or cut off.
    """
    with _opened(path) as file:
        return sum(map(_group_bytes, _row_groups(file.metadata)))


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a damaged column name
        raise FormatError(f"{path} is no complete Parquet file: {said(error)}. Copy it again.") from error


def _batch_rows(metadata: pq.FileMetaData) -> int:
    groups = _row_groups(metadata)
    row_bytes = max((_group_bytes(group) / group.num_rows for group in groups if group.num_rows), default=1)
    return int(min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // (row_bytes + 1))))


def _row_groups(metadata: pq.FileMetaData) -> list[pq.RowGroupMetaData]:
    return [metadata.row_group(number) for number in range(metadata.num_row_groups)]


def _group_bytes(group: pq.RowGroupMetaData) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(
        column.num_values * _WIDTHS[column.physical_type]
        if column.physical_type in _WIDTHS
        else column.total_uncompressed_size * _TEXT_GROWTH
        for column in columns
    )
