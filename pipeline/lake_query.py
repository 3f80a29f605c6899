"""A user's query of a lake, run: reading only, within its limits, stopped when the user says so."""

from __future__ import annotations

import uuid
from pathlib import Path
from tempfile import gettempdir

import duckdb
import pyarrow as pa

from pipeline.catalog import quoted
from pipeline.errors import QueryError, said
from pipeline.interrupts import stoppable
from pipeline.query import Limits, Selection, reading_only


def answered(connection: duckdb.DuckDBPyConnection, files: Path, sql: str, limits: Limits) -> Selection:
    """The answer to a user's query; what it may do and what it raises, see `Reader.select`.

    Args:
        connection: of a reader; from here on it reaches nothing but `files`.
        files: the folder of the lake's data files.
    """
    checked = reading_only(connection, sql)
    with stoppable(connection.interrupt, limits.timeout_seconds) as stopped:
        try:
            _lock_down(connection, files, limits.memory)
            return _selection(connection.execute(checked), limits.max_rows)
        except duckdb.InterruptException as error:
            if stopped.by_user:
                raise KeyboardInterrupt from error
            raise QueryError(
                f"The query took longer than {limits.timeout_seconds:g} s and was stopped. "
                "Ask for less, or give it more with --timeout."
            ) from error
        except duckdb.OutOfMemoryException as error:
            raise QueryError(
                f"The query needs more memory than {limits.memory or 'there is'}. "
                "Ask for less, or give it more with --memory-limit."
            ) from error
        except duckdb.Error as error:
            raise QueryError(
                f"The query failed: {said(error)}. Mend it; `describe` names a relation's columns."
            ) from error


def _lock_down(connection: duckdb.DuckDBPyConnection, files: Path, memory: str | None) -> None:
    """From here on the session reaches this lake's data files only; it cannot be undone."""
    row = connection.execute("select current_setting('lock_configuration')").fetchone()
    if row is not None and row[0]:
        return
    # What does not fit into memory goes aside, by default into the folder the user stands in.
    aside = Path(gettempdir()) / f"echomine-{uuid.uuid4().hex}"
    connection.execute(f"set temp_directory = '{quoted(aside)}'")
    if memory is not None:
        connection.execute(f"set memory_limit = '{memory}'")
    connection.execute(f"set allowed_directories = ['{quoted(files)}/']")
    connection.execute("set python_enable_replacements = false")  # our own variables are no tables
    connection.execute("set enable_external_access = false; set lock_configuration = true")


def _selection(result: duckdb.DuckDBPyConnection, max_rows: int | None) -> Selection:
    names = [column[0] for column in result.description]
    if max_rows is None:
        return Selection(names, result.to_arrow_table())
    reader = result.to_arrow_reader(max_rows + 1)
    batches, num_rows = list[pa.RecordBatch](), 0
    while num_rows <= max_rows:
        try:
            batches.append(reader.read_next_batch())
        except StopIteration:
            break
        num_rows += batches[-1].num_rows
    table = pa.Table.from_batches(batches, reader.schema)
    return Selection(names, table.slice(0, max_rows), cut_off=num_rows > max_rows)
