"""Reading a lake: a session pinned to one snapshot, with the macros and views of `sql/`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from pipeline import schema
from pipeline.errors import LakeError
from pipeline.lake_query import answered
from pipeline.query import Limits, Selection
from pipeline.sqlfiles import macros, params_of, relations, relations_of
from pipeline.verified import Verification

if TYPE_CHECKING:
    from pipeline.lake import Lake

NO_LIMITS = Limits()
# `meta` names the runs of each group that lies in several, under this and the group's id.
SPANNING_GROUP = "a run of group "

_HISTORY = """
    select
        history.snapshot_id as snapshot,
        history.snapshot_time as created_at,
        coalesce(bool_or(
            list_contains(history.changes['tables_inserted_into'], tables.table_id::varchar)
            or list_contains(history.changes['tables_deleted_from'], tables.table_id::varchar)
        ), false) as changed_rollouts
    from ducklake_snapshots('lake') as history, __ducklake_metadata_lake.ducklake_table as tables
    where tables.table_name in ('rollouts', 'verdicts')
    group by all
"""

_TABLES = """
    select table_name as name
    from __ducklake_metadata_lake.ducklake_table
    where begin_snapshot <= $snapshot and (end_snapshot is null or end_snapshot > $snapshot)
"""

# Of the snapshot `$snapshot`; a file that holds rows of one run alone has it as its first and its last.
DATA_FILES = """
    select
        data.data_file_id,
        tables.table_name,
        'files/main/' || tables.table_name || '/' || parse_filename(data.path) as path,
        data.record_count as num_rows,
        stats.min_value as first_run,
        stats.max_value as last_run
    from __ducklake_metadata_lake.ducklake_data_file as data
    join __ducklake_metadata_lake.ducklake_table as tables using (table_id)
    left join (
        __ducklake_metadata_lake.ducklake_file_column_stats as stats
        join __ducklake_metadata_lake.ducklake_column as columns
            on columns.table_id = stats.table_id
            and columns.column_id = stats.column_id
            and columns.column_name = 'run_id'
    ) on stats.data_file_id = data.data_file_id
    where data.begin_snapshot <= $snapshot
        and (data.end_snapshot is null or data.end_snapshot > $snapshot)
"""


class Reader:
    """A read-only session pinned to one snapshot; `rollouts`, `groups`, … are plain relation names in it.

    Attributes:
        tables: those that the snapshot has; a table that came later is empty in the session.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, lake: Lake, snapshot: int) -> None:
        self.connection = connection
        self.lake = lake
        self.snapshot = snapshot
        self._unmade = dict(relations())
        self._add_later_tables()
        for statement in macros():
            connection.execute(statement)

    def _make(self, names: Collection[str]) -> None:
        """Makes the views and table macros of these names; to make all takes as long as to mine."""
        for name in relations() if "duckdb_views" in names else names:
            statement = self._unmade.pop(name, None)
            if statement is None:
                continue
            if name == "judged_rollouts" and not self.has_verdicts:
                # joining every rollout with no verdict would read all their ids
                self.connection.execute("create or replace temp view judged_rollouts as from rollouts")
            else:
                self._make(relations_of(statement))
                self.connection.execute(statement)

    @cached_property
    def has_verdicts(self) -> bool:
        """Whether any rollout was judged again."""
        return "verdicts" in self.tables and bool(self.rows("select 1 from verdicts limit 1"))

    def _add_later_tables(self) -> None:
        """Tables that came after this snapshot are empty in it."""
        # DuckDB's own list of them takes five times as long
        self.tables = {row["name"] for row in self.rows(_TABLES, {"snapshot": self.snapshot})}
        if "meta" not in self.tables:
            raise LakeError(
                f"Snapshot {self.snapshot} of the lake in {self.lake.folder} is from before its tables were "
                'made. See `echomine sql "from snapshots"` for later ones.'
            )
        for name, columns in schema.TABLES.items():
            if name not in self.tables:
                self.materialize_rows(name, columns.empty_table())

    def table(self, sql: str, params: Mapping[str, Any] | None = None) -> pa.Table:
        """The result of a query; of `params`, those that the text names with `$` are bound."""
        bound = {name: (params or {})[name] for name in params_of(sql)}
        self._make(relations_of(sql))
        return self.connection.execute(sql, bound).to_arrow_table()

    def batches(self, sql: str, num_rows: int, params: Mapping[str, Any] | None = None) -> Iterator[pa.Table]:
        """The result of a query, at most `num_rows` rows at a time; it is computed while it is read."""
        bound = {name: (params or {})[name] for name in params_of(sql)}
        self._make(relations_of(sql))
        for batch in self.connection.execute(sql, bound).to_arrow_reader(num_rows):
            yield pa.Table.from_batches([batch])

    def rows(self, sql: str, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.table(sql, params).to_pylist()
        return rows

    def materialize(self, name: str, sql: str, params: Mapping[str, Any]) -> None:
        """Keeps a query's result as the temporary relation `name` for the queries that build on it."""
        bound = {param: params[param] for param in params_of(sql)}
        self._make(relations_of(sql))
        self.connection.execute(f'create or replace temp table "{name}" as {sql}', bound)

    def materialize_rows(self, name: str, rows: pa.Table) -> None:
        """Keeps Arrow rows as the temporary relation `name`."""
        with self.relation("incoming", rows):
            self.connection.execute(f'create or replace temp table "{name}" as from incoming')

    @contextmanager
    def relation(self, name: str, rows: pa.Table) -> Iterator[None]:
        """Arrow rows as the relation `name` where they are, for as long as the block runs."""
        self.connection.register(name, rows)
        try:
            yield
        finally:
            self.connection.unregister(name)

    def data_snapshot(self) -> int:
        """The snapshot of the last change to rollouts or their verdicts: what a mining here really mines.

        Files do not tell: one that was merged from the files of many commits holds them all. Where older
        snapshots ended, the oldest that is left stands for the change.
        """
        sql = f"""
            select coalesce(max(snapshot) filter (changed_rollouts), min(snapshot)) as n
            from ({_HISTORY})
            where snapshot <= $snapshot
        """
        return int(self.rows(sql, {"snapshot": self.snapshot})[0]["n"])

    def data_files(self, runs: tuple[str, str] | None = None) -> set[str]:
        """The snapshot's data files, as paths relative to the lake's folder.

        Args:
            runs: only files of `rollouts` that may hold rows of the runs from the first to the last of these.
        """
        rows = self.rows(
            f"""
            select path from ({DATA_FILES})
            where $first is null
                or (table_name = 'rollouts' and coalesce(last_run >= $first and first_run <= $last, true))
            """,
            {"snapshot": self.snapshot, "first": runs and runs[0], "last": runs and runs[1]},
        )
        return {row["path"] for row in rows}

    def unrecorded_files(self) -> list[tuple[str, str, int]]:
        """Path, table and number of rows of the data files without a SHA-256 in `files`."""
        rows = self.rows(
            f"select path, table_name, num_rows from ({DATA_FILES}) "
            "where path not in (select files.path from files) order by path",
            {"snapshot": self.snapshot},
        )
        return [(row["path"], row["table_name"], row["num_rows"]) for row in rows]

    def recorded_hashes(self) -> dict[str, str]:
        """SHA-256 by path, relative to the lake's folder, of all data files that this snapshot knows of."""
        return {row["path"]: row["sha256"] for row in self.rows("select path, sha256 from files")}

    def verification(
        self,
        runs: tuple[str, str] | None = None,
        everything: bool = False,
        only: Collection[str] | None = None,
        newest: Reader | None = None,
    ) -> Verification:
        """Starts to look whether data files are as they were written.

        Args:
            runs: only files that may hold rollouts of the runs from the first to the last of these.
            everything: also files that are noted as unchanged.
            only: only these files.
            newest: knows the hashes of files that were merged after this session's snapshot.
        """
        hashes = (newest or self).recorded_hashes()
        files = self.data_files(runs) if only is None else set(only)
        # A file that was merged moments ago may have no hash yet; that it is there can be told.
        known = {
            path: hashes.get(path, "")
            for path in files
            if path in hashes or not (self.lake.folder / path).is_file()
        }
        return Verification(self.lake.folder, known, everything)

    def history(self) -> list[dict[str, Any]]:
        """Every snapshot in order: `snapshot`, `created_at`, `changed_rollouts` (or their verdicts)."""
        return self.rows(f"{_HISTORY} order by snapshot")

    def select(self, sql: str, limits: Limits = NO_LIMITS) -> Selection:
        """Runs a user's query: reading only, nothing beyond this lake's folder.

        Args:
            limits: the first query's memory limit holds for the session.

        Raises:
            QueryError: it is wrong, would write, reaches for other files, or takes more than it may.
            KeyboardInterrupt: the user stopped it; the session can go on.
        """
        self._make(relations())
        return answered(self.connection, self.lake.files, sql, limits)
