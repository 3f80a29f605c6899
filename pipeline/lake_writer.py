"""Writing a lake: its transactions, and how rows get into its tables.

Rows go into data files of their own or, where they are few, into the catalog.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.catalog import Catalog, session
from pipeline.lake_reader import SPANNING_GROUP
from pipeline.parquet import write_data_file
from pipeline.verified import note_written

# Fewer rows are kept in the catalog itself (DuckLake's data inlining) instead of a tiny file each.
INLINED_ROWS = 1000
INLINED_BYTES = 1 << 18  # more would swell the catalog: refused rows are kept whole
# What a mining reads or writes is in data files however small: their hashes and snapshots name the mining.
ALWAYS_FILES = ("rollouts", "echo_clips", "verdicts")

Result = TypeVar("Result")


class Writer:
    """A session that changes the lake in one transaction, which whoever uses it begins."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, folder: Path, written: list[Path]) -> None:
        """Nothing is changed yet.

        Args:
            connection: the lake attached.
            folder: of the lake.
            written: gets the data files of the transaction, each before it is written.
        """
        self.connection = connection
        self.folder = folder
        self._written = written

    def begin(self) -> None:
        self.connection.execute("begin")

    def append(self, tables: Mapping[str, pa.Table]) -> dict[str, int]:
        """`Lake.commit`, but for the commit."""
        fresh = {name: self._new_rows(name, rows) for name, rows in tables.items()}
        self.begin()
        for name, rows in fresh.items():
            self.add(name, rows)
        if "rollouts" in fresh:
            self._note_spanning_groups(fresh["rollouts"])
        return {name: rows.num_rows for name, rows in fresh.items()}

    def replace_rollouts(self, rows: pa.Table, scorings: pa.Table) -> int:
        """`Lake.replace_rollouts`, but for the commit."""
        rows, scorings = self.still_held(rows), self.still_held(scorings)
        self.begin()
        if rows.num_rows:
            self.connection.register("incoming", rows.select(["rollout_id"]))
            self.connection.execute(
                "delete from rollouts where rollout_id in (select incoming.rollout_id from incoming)"
            )
            self.connection.unregister("incoming")
            self.add_file("rollouts", rows)
            self.add("scorings", scorings)
        return int(rows.num_rows)

    def still_held(self, rows: pa.Table) -> pa.Table:
        """Those of rows about rollouts whose rollout is in the lake: others may have been forgotten."""
        self.connection.register("incoming", rows.select(["rollout_id"]))
        held = self.connection.execute(
            "select rollout_id from rollouts where rollout_id in (select incoming.rollout_id from incoming)"
        ).to_arrow_table()
        self.connection.unregister("incoming")
        return rows.filter(pc.is_in(rows["rollout_id"], held["rollout_id"].combine_chunks()))

    def migrate(self) -> None:
        """Makes the tables that a lake of an older schema lacks, and notes what its commits did not."""
        self.begin()
        for table in schema.TABLES:
            self.connection.execute(schema.ddl(table))
        held = self.connection.execute("select distinct group_id, run_id from rollouts").to_arrow_table()
        self._note_spanning_groups(held)
        self.connection.execute(
            "update meta set value = ? where key = 'schema_version'", [str(schema.SCHEMA_VERSION)]
        )

    def add(self, name: str, rows: pa.Table) -> None:
        """Appends rows to a table, where they belong."""
        if not rows.num_rows:
            return
        few = rows.num_rows <= INLINED_ROWS and rows.nbytes <= INLINED_BYTES
        if few and name not in ALWAYS_FILES:
            self._insert(name, rows)
        else:
            self.add_file(name, rows)

    def add_file(self, name: str, rows: pa.Table) -> None:
        """Appends rows to a table as a data file, whose hash `files` records."""
        file = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}.parquet"
        path = self.folder / "files" / "main" / name / file
        self._written.append(path)
        sha256 = write_data_file(rows, path)
        self.connection.execute("call ducklake_add_data_files('lake', ?, ?)", [name, str(path)])
        record = {
            "path": str(path.relative_to(self.folder)),
            "table_name": name,
            "sha256": sha256,
            "num_rows": rows.num_rows,
            "created_at": datetime.now(UTC),
        }
        self._insert("files", pa.Table.from_pylist([record], schema.FILES))
        note_written(self.folder, {record["path"]: sha256})

    def _insert(self, name: str, rows: pa.Table) -> None:
        self.connection.register("incoming", rows)
        self.connection.execute(f'insert into "{name}" by name from incoming')
        self.connection.unregister("incoming")

    def _new_rows(self, name: str, rows: pa.Table) -> pa.Table:
        """The rows whose key is neither in the table nor earlier in `rows`."""
        if not rows.num_rows:
            return rows
        key_columns = schema.KEYS[name]
        keys = ", ".join(f'"{key}"' for key in key_columns)
        numbered = rows.select(list(key_columns)).append_column(
            "nth_incoming", pa.array(range(rows.num_rows))
        )
        self.connection.register("incoming", numbered)
        same = " and ".join(
            f'held."{key}" is not distinct from incoming."{key}"' for key in schema.KEYS[name]
        )
        # A key column of one value, such as a mining's name, spares the files that cannot hold it. Not so a
        # text from outside: DuckLake pastes the value into a query of its catalog, which a NUL character
        # cuts off.
        keys_of_ours = () if name == "quarantine" else key_columns
        shared = {key: values[0] for key in keys_of_ours if len(values := rows[key].unique()) == 1}
        shared = {key: value.as_py() for key, value in shared.items() if value.is_valid}
        here = "".join(f' and held."{key}" = ${key}' for key in shared)
        fresh = self.connection.execute(
            f"""
            select min(nth_incoming) as nth_incoming from incoming
            where not exists (select 1 from "{name}" as held where {same}{here})
            group by {keys} order by 1
            """,
            shared,
        ).to_arrow_table()
        self.connection.unregister("incoming")
        return rows.take(fresh["nth_incoming"])

    def _note_spanning_groups(self, rows: pa.Table) -> None:
        """Names in `meta` the runs of each group of `rows` that lies in several, where that is news."""
        self.connection.register("incoming", rows.select(["group_id", "run_id"]))
        self.connection.execute(
            """
            insert into meta
            with
            places as (
                select distinct group_id, run_id from rollouts
                where group_id in (select incoming.group_id from incoming)
            )
            select $spanning || group_id as key, run_id as value
            from places
            qualify count(*) over (partition by group_id) > 1
            except
            select key, value from meta
            """,
            {"spanning": SPANNING_GROUP},
        )
        self.connection.unregister("incoming")


def transaction(catalog: Catalog, folder: Path, change: Callable[[Writer], Result]) -> Result:
    """Commits what `change` does to the lake in `folder`; what fails leaves neither rows nor files.

    Args:
        change: begins a transaction.
    """
    written = list[Path]()
    try:
        with session() as connection:
            catalog.attach(connection)
            result = change(Writer(connection, folder, written))
            # Interrupted, it may have gone through: better an orphan than a lost file.
            committed, written[:] = list(written), []
            try:
                connection.execute("commit")
            except duckdb.Error:
                written += _unnamed(catalog, committed)
                raise
            return result
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _unnamed(catalog: Catalog, files: list[Path]) -> list[Path]:
    """Those that the catalog does not name: a server's answer to a commit may be lost on the way."""
    try:
        with session() as connection:
            catalog.attach(connection, "read_only")
            named = connection.execute(
                "select parse_filename(path) from __ducklake_metadata_lake.ducklake_data_file"
            ).fetchall()
    except duckdb.Error:
        return []  # unknown, so all are kept; `delete_orphans` finds those that no snapshot names
    return [path for path in files if (path.name,) not in named]


def make_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Begins a transaction that makes all tables; the option before it is set at once."""
    connection.execute(f"call ducklake_set_option('lake', 'data_inlining_row_limit', '{INLINED_ROWS}')")
    connection.execute("begin")
    for table in schema.TABLES:
        connection.execute(schema.ddl(table))
    connection.execute("insert into meta values ('schema_version', ?)", [str(schema.SCHEMA_VERSION)])
