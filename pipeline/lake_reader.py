"""Reading a lake: a session pinned to one snapshot, with the macros and views of `sql/`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from pipeline import schema
from pipeline.catalog import quoted
from pipeline.errors import QueryError, said
from pipeline.hashing import file_sha256
from pipeline.interrupts import stoppable
from pipeline.query import Limits, Selection, reading_only
from pipeline.sqlfiles import macros, params_of, views

if TYPE_CHECKING:
    from pipeline.lake import Lake

NO_LIMITS = Limits()


@dataclass(frozen=True)
class DamagedFile:
    path: str
    problem: str


class Reader:
    """A read-only session pinned to one snapshot; `rollouts`, `groups`, … are plain relation names in it."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, lake: Lake, snapshot: int) -> None:
        self.connection = connection
        self.lake = lake
        self.snapshot = snapshot
        self._locked = False
        self._add_later_tables()
        for statement in (*macros(), *views()):
            connection.execute(statement)

    def _add_later_tables(self) -> None:
        """Tables that came after this snapshot are empty in it."""
        held = {row["name"] for row in self.rows("select table_name as name from duckdb_tables()")}
        for name, columns in schema.TABLES.items():
            if name not in held:
                self.materialize_rows(name, columns.empty_table())

    def table(self, sql: str, params: Mapping[str, Any] | None = None) -> pa.Table:
        """The result of a query; of `params`, those that the text names with `$` are bound."""
        bound = {name: (params or {})[name] for name in params_of(sql)}
        return self.connection.execute(sql, bound).to_arrow_table()

    def batches(self, sql: str, num_rows: int, params: Mapping[str, Any] | None = None) -> Iterator[pa.Table]:
        """The result of a query, at most `num_rows` rows at a time; it is computed while it is read."""
        bound = {name: (params or {})[name] for name in params_of(sql)}
        for batch in self.connection.execute(sql, bound).to_arrow_reader(num_rows):
            yield pa.Table.from_batches([batch])

    def rows(self, sql: str, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.table(sql, params).to_pylist()
        return rows

    def materialize(self, name: str, sql: str, params: Mapping[str, Any]) -> None:
        """Keeps a query's result as the temporary relation `name` for the queries that build on it."""
        bound = {param: params[param] for param in params_of(sql)}
        self.connection.execute(f'create or replace temp table "{name}" as {sql}', bound)

    def materialize_rows(self, name: str, rows: pa.Table) -> None:
        """Keeps Arrow rows as the temporary relation `name`."""
        self.connection.register("incoming", rows)
        self.connection.execute(f'create or replace temp table "{name}" as from incoming')
        self.connection.unregister("incoming")

    def data_snapshot(self) -> int:
        """The snapshot of the last change to `rollouts` or `verdicts`: what a mining here really mines."""
        return int(
            self.rows(
                """
                select coalesce(max(data.begin_snapshot), 0) as snapshot
                from __ducklake_metadata_lake.ducklake_data_file as data
                join __ducklake_metadata_lake.ducklake_table as tables using (table_id)
                where tables.table_name in ('rollouts', 'verdicts') and data.begin_snapshot <= $snapshot
                """,
                {"snapshot": self.snapshot},
            )[0]["snapshot"]
        )

    def touched_groups(self, since_snapshot: int) -> pa.Table:
        """[group_id] of the groups that got rollouts after `since_snapshot`."""
        if since_snapshot >= self.snapshot:
            return pa.table({"group_id": pa.array([], pa.string())})
        return self.table(
            "select distinct group_id from ducklake_table_insertions('lake', 'main', 'rollouts', $a, $b)",
            {"a": since_snapshot + 1, "b": self.snapshot},
        )

    def damaged_files(self, since_snapshot: int = -1) -> list[DamagedFile]:
        """Data files added after `since_snapshot` that are missing or not as they were written."""
        damaged = []
        for row in self.rows(
            """
            select files.path, files.sha256
            from files
            join __ducklake_metadata_lake.ducklake_data_file as data
                on ends_with(files.path, parse_filename(data.path))
            where data.begin_snapshot > $since and data.end_snapshot is null
            order by files.path
            """,
            {"since": since_snapshot},
        ):
            path = self.lake.folder / row["path"]
            if not path.is_file():
                damaged.append(DamagedFile(row["path"], "is missing"))
            elif file_sha256(path) != row["sha256"]:
                damaged.append(DamagedFile(row["path"], "is not as it was written (its SHA-256 differs)"))
        return damaged

    def select(self, sql: str, limits: Limits = NO_LIMITS) -> Selection:
        """Runs a user's query: reading only, nothing beyond this lake's folder.

        Args:
            limits: the first query's memory limit holds for the session.

        Raises:
            QueryError: it is wrong, would write, reaches for other files, or takes more than it may.
            KeyboardInterrupt: the user stopped it; the session can go on.
        """
        checked = reading_only(self.connection, sql)
        with stoppable(self.connection.interrupt, limits.timeout_seconds) as stopped:
            try:
                self._lock_down(limits.memory)
                return _answer(self.connection.execute(checked), limits.max_rows)
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

    def _lock_down(self, memory: str | None) -> None:
        """From here on the session reaches this lake's data files only; it cannot be undone."""
        if self._locked:
            return
        # What does not fit into memory goes aside, by default into the folder the user stands in.
        aside = Path(gettempdir()) / f"echomine-{uuid.uuid4().hex}"
        self.connection.execute(f"set temp_directory = '{quoted(aside)}'")
        if memory is not None:
            self.connection.execute(f"set memory_limit = '{memory}'")
        self.connection.execute(f"set allowed_directories = ['{quoted(self.lake.files)}/']")
        self.connection.execute("set python_enable_replacements = false")  # our own variables are no tables
        self.connection.execute("set enable_external_access = false; set lock_configuration = true")
        self._locked = True


def _answer(result: duckdb.DuckDBPyConnection, max_rows: int | None) -> Selection:
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
