"""Reading a lake: a session pinned to one snapshot, with the macros and views of `sql/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from pipeline.catalog import quoted
from pipeline.errors import QueryError, said
from pipeline.query import Selection, reading_only
from pipeline.sqlfiles import macros, params_of, views
from pipeline.verified import Verification

if TYPE_CHECKING:
    from pipeline.lake import Lake


# `meta` names the runs of each group that lies in several, under this and the group's id.
SPANNING_GROUP = "a run of group "

_NEWS = """
    select group_id, run_id
    from ducklake_table_insertions('lake', 'main', 'rollouts', $first, $last)
    where snapshot_id > $since
"""


class Reader:
    """A read-only session pinned to one snapshot; `rollouts`, `groups`, … are plain relation names in it."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, lake: Lake, snapshot: int) -> None:
        self.connection = connection
        self.lake = lake
        self.snapshot = snapshot
        self._locked = False
        for statement in (*macros(), *views()):
            connection.execute(statement)

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
        """The snapshot of the last change to `rollouts`: what a mining of this session really mines.

        Files do not tell: one that was merged from the files of many commits holds them all.
        """
        return int(
            self.rows(
                """
                select coalesce(max(history.snapshot_id), 0) as snapshot
                from ducklake_snapshots('lake') as history, __ducklake_metadata_lake.ducklake_table as tables
                where tables.table_name = 'rollouts'
                    and history.snapshot_id <= $snapshot
                    and (
                        list_contains(history.changes['tables_inserted_into'], tables.table_id::varchar)
                        or list_contains(history.changes['tables_deleted_from'], tables.table_id::varchar)
                    )
                """,
                {"snapshot": self.snapshot},
            )[0]["snapshot"]
        )

    def touched_groups(self, since_snapshot: int) -> pa.Table:
        """[group_id] of the groups that got rollouts after `since_snapshot`."""
        if since_snapshot >= self.snapshot:
            return pa.table({"group_id": pa.array([], pa.string())})
        return self.table(f"select distinct group_id from ({_NEWS})", self._news_params(since_snapshot))

    def touched_runs(self, since_snapshot: int) -> tuple[str, str] | None:
        """The first and last run, by name, of all rollouts of the groups touched after `since_snapshot`.

        A night's run has only files of its own, so this spares a mining the others. None: any run.
        """
        if since_snapshot >= self.snapshot:
            return None
        bounds = self.rows(
            f"""
            with
            news as (select distinct group_id, run_id from ({_NEWS})),
            runs as (
                select run_id from news
                union all
                select meta.value from meta join news on meta.key = $spanning || news.group_id
            )
            select min(run_id) as first, max(run_id) as last, bool_or(run_id is null) as unknown from runs
            """,
            self._news_params(since_snapshot) | {"spanning": SPANNING_GROUP},
        )[0]
        return None if bounds["unknown"] or bounds["first"] is None else (bounds["first"], bounds["last"])

    def _news_params(self, since_snapshot: int) -> dict[str, int]:
        # Changes are asked for from a snapshot on that is there; the one after may have expired.
        first = self.rows(
            "select max(snapshot_id) as n from ducklake_snapshots('lake') where snapshot_id <= $since + 1",
            {"since": since_snapshot},
        )[0]["n"]
        return {"first": first, "last": self.snapshot, "since": since_snapshot}

    def data_files(self, runs: tuple[str, str] | None = None) -> dict[str, str]:
        """SHA-256 by path, relative to the lake's folder, of the snapshot's data files.

        Args:
            runs: only files of `rollouts` that may hold rows of the runs from the first to the last of these.
        """
        rows = self.rows(
            """
            select files.path, files.sha256
            from files
            join __ducklake_metadata_lake.ducklake_data_file as data
                on parse_filename(data.path) = parse_filename(files.path)
            left join (
                select stats.data_file_id, stats.min_value, stats.max_value
                from __ducklake_metadata_lake.ducklake_file_column_stats as stats
                join __ducklake_metadata_lake.ducklake_column as columns using (table_id, column_id)
                where columns.column_name = 'run_id'
            ) as runs using (data_file_id)
            where data.begin_snapshot <= $snapshot
                and (data.end_snapshot is null or data.end_snapshot > $snapshot)
                and (
                    $first is null
                    or (
                        files.table_name = 'rollouts'
                        and coalesce(runs.max_value >= $first and runs.min_value <= $last, true)
                    )
                )
            """,
            {"snapshot": self.snapshot, "first": runs and runs[0], "last": runs and runs[1]},
        )
        return {row["path"]: row["sha256"] for row in rows}

    def verification(self, runs: tuple[str, str] | None = None, everything: bool = False) -> Verification:
        """Starts to look whether data files (those of `runs`) are as they were written."""
        return Verification(self.lake.folder, self.data_files(runs), everything)

    def select(self, sql: str) -> Selection:
        """Runs a user's query: reading only, nothing beyond this lake's folder.

        Raises:
            QueryError: it is wrong, would write, or reaches for other files.
        """
        checked = reading_only(self.connection, sql)
        self._lock_down()
        try:
            result = self.connection.execute(checked)
            return Selection([column[0] for column in result.description], result.to_arrow_table())
        except duckdb.Error as error:
            raise QueryError(
                f"The query failed: {said(error)}. Mend it; `describe` names a relation's columns."
            ) from error

    def _lock_down(self) -> None:
        """From here on the session reaches this lake's data files only; it cannot be undone."""
        if self._locked:
            return
        self.connection.execute(f"set allowed_directories = ['{quoted(self.lake.files)}/']")
        self.connection.execute("set python_enable_replacements = false")  # our own variables are no tables
        self.connection.execute("set enable_external_access = false; set lock_configuration = true")
        self._locked = True
