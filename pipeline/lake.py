"""The rollout lake: plain Parquet files plus a SQL catalog (DuckLake), versioned and transactional.

    lake/catalog.sqlite   the catalog
    lake/files/           data files
    lake/runs/            what nights leave behind: reports, metrics, checkpoints, shards

Writers of one machine take turns (a file lock around each commit); readers never wait and never see
half a commit. Every commit is a snapshot that can be queried again.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa
from filelock import FileLock

from pipeline import schema
from pipeline.catalog import Catalog, retried, session
from pipeline.errors import LakeError, said
from pipeline.holds import held, hold
from pipeline.lake_reader import SPANNING_GROUP, Reader
from pipeline.parquet import write_data_file
from pipeline.verified import note_written

# Fewer rows are kept in the catalog itself (DuckLake's data inlining) instead of a tiny file each.
INLINED_ROWS = 1000
MERGED_FILE = "ducklake-"  # how the names of files begin that hold what other files held before
_DAMAGE = re.compile(r"magic bytes|corrupt|malformed|ZSTD|TProtocol|parquet metadata", re.IGNORECASE)

Result = TypeVar("Result")


class Lake:
    """One lake folder. Open with `Lake.create` to write, `Lake.open` to read or write an existing one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.catalog = Catalog(folder / "catalog.sqlite", self.files)
        self._lock = FileLock(folder / "write.lock")

    @classmethod
    def open(cls, folder: Path) -> Lake:
        """An existing lake; one of an older schema gets the tables it lacks.

        Raises:
            LakeError: there is none, it is damaged, or it was made by a newer EchoMine.
        """
        lake = cls(folder.absolute())
        if not lake.catalog.path.is_file():
            raise LakeError(
                f"There is no lake in {folder}. Give its folder with --lake or ECHOMINE_LAKE, "
                "or make one with `echomine nightly` or `echomine import`."
            )
        with lake.reader() as reader:
            version = int(reader.rows("select value from meta where key = 'schema_version'")[0]["value"])
        if version > schema.SCHEMA_VERSION:
            raise LakeError(
                f"The lake in {folder} has schema {version}, this EchoMine knows {schema.SCHEMA_VERSION}. "
                "Update EchoMine; nothing was changed."
            )
        if version < schema.SCHEMA_VERSION:
            lake._migrate()
        return lake

    @classmethod
    def create(cls, folder: Path) -> Lake:
        """The lake in `folder`, made if there is none yet."""
        lake = cls(folder.absolute())
        try:
            lake.files.mkdir(parents=True, exist_ok=True)
            with lake._lock:
                if not lake.catalog.path.exists():
                    lake._create_tables()
        except (OSError, duckdb.Error) as error:
            what = error.strerror if isinstance(error, OSError) else None
            raise LakeError(
                f"Cannot make or write a lake in {folder}: {what or said(error)}. "
                "Choose another folder with --lake, or mend its permissions."
            ) from error
        return cls.open(folder)

    def _create_tables(self) -> None:
        # Built under another name, so that a crash leaves no half-made catalog behind.
        building = self.catalog.path.with_name(f"building-{uuid.uuid4().hex}.sqlite")
        try:
            with session() as connection:
                Catalog(building, self.files).attach(connection, "meta_journal_mode 'wal'")
                connection.execute("begin")
                for table in schema.TABLES:
                    connection.execute(schema.ddl(table))
                connection.execute(
                    "insert into meta values ('schema_version', ?)", [str(schema.SCHEMA_VERSION)]
                )
                connection.execute("commit")
                option = f"'data_inlining_row_limit', '{INLINED_ROWS}'"
                connection.execute(f"call ducklake_set_option('lake', {option})")
            building.rename(self.catalog.path)  # SQLite has moved its journal into the file by now
        finally:
            _remove(list(building.parent.glob(f"{building.name}*")))

    def _migrate(self) -> None:
        def change(connection: duckdb.DuckDBPyConnection, _written: list[Path]) -> None:
            connection.execute("begin")
            for table in schema.TABLES:
                connection.execute(schema.ddl(table))
            connection.execute(
                "update meta set value = ? where key = 'schema_version'", [str(schema.SCHEMA_VERSION)]
            )

        self._changed(change)

    @contextmanager
    def reader(self, snapshot: int | None = None) -> Iterator[Reader]:
        """A read-only session on one snapshot (the newest by default), with macros and views.

        Raises:
            LakeError: no such snapshot, or the catalog cannot be read.
        """
        holding = nullcontext() if snapshot is None else hold(self.folder, snapshot)
        try:
            with holding, session() as connection:
                yield self._pinned(connection, snapshot)
        except duckdb.Error as error:
            # A damaged file has no exception of its own; what a wrong query raises stays as it is.
            if not isinstance(error, duckdb.IOException) and not _DAMAGE.search(str(error)):
                raise
            raise LakeError(
                f"The lake in {self.folder} cannot be read: {said(error)}. "
                "Run `echomine doctor` to see what is damaged."
            ) from error

    def _pinned(self, connection: duckdb.DuckDBPyConnection, snapshot: int | None) -> Reader:
        try:
            newest = (
                snapshot
                if snapshot is not None
                else retried(partial(self.catalog.newest_snapshot, connection))
            )
            retried(partial(self.catalog.attach, connection, "read_only", snapshot=newest))
            return Reader(connection, self, newest)
        except duckdb.Error as error:
            if "No snapshot found" in str(error):
                raise LakeError(
                    f"The lake in {self.folder} has no snapshot {snapshot}. "
                    'See `echomine sql "from snapshots"` for those it has.'
                ) from error
            raise LakeError(
                f"The catalog {self.catalog.path} cannot be read: {said(error)}. "
                "Restore it from a backup; the data files beside it were not touched."
            ) from error

    def commit(self, tables: Mapping[str, pa.Table]) -> dict[str, int]:
        """Appends rows to several tables in one transaction; rows whose key is there already are left out.

        Args:
            tables: rows by table name, each of the table's Arrow schema.

        Returns:
            the number of new rows by table.

        Raises:
            LakeError: the lake cannot be written; then nothing of this commit is in it.
        """

        def change(connection: duckdb.DuckDBPyConnection, written: list[Path]) -> dict[str, int]:
            fresh = {name: _new_rows(connection, name, rows) for name, rows in tables.items()}
            connection.execute("begin")
            for name, rows in fresh.items():
                self._add(connection, name, rows, written)
            if "rollouts" in fresh:
                _note_spanning_groups(connection, fresh["rollouts"])
            return {name: rows.num_rows for name, rows in fresh.items()}

        return self._changed(change)

    def replace_rollouts(self, rows: pa.Table, scorings: pa.Table) -> None:
        """Puts rows in the place of those of the same rollout_id, and notes who scored them, all or nothing.

        Earlier snapshots keep the old rows; a mining of the new one is another mining.

        Raises:
            LakeError: the lake cannot be written; then the old rows stay.
        """

        def change(connection: duckdb.DuckDBPyConnection, written: list[Path]) -> None:
            connection.execute("begin")
            connection.register("incoming", rows.select(["rollout_id"]))
            connection.execute("delete from rollouts where rollout_id in (select rollout_id from incoming)")
            connection.unregister("incoming")
            self._add_file(connection, "rollouts", rows, written)
            self._add(connection, "scorings", scorings, written)

        self._changed(change)

    def touch_mining(self, mining_id: str) -> None:
        """Makes a recorded mining the newest: it was asked for again, so its clips are wanted now."""

        def change(connection: duckdb.DuckDBPyConnection, _written: list[Path]) -> None:
            connection.execute("begin")
            connection.execute(
                "update mining_runs set created_at = now() where mining_id = ? "
                "and created_at < (select max(created_at) from mining_runs)",
                [mining_id],
            )

        self._changed(change)

    def _changed(self, change: Callable[[duckdb.DuckDBPyConnection, list[Path]], Result]) -> Result:
        """Commits what `change` does, while no other writer of this machine writes.

        Args:
            change: begins a transaction, and lists the files it writes before it writes them.
        """

        def once() -> Result:
            written = list[Path]()
            try:
                with session() as connection:
                    self.catalog.attach(connection)
                    result = change(connection, written)
                    # Interrupted, it may have gone through: better an orphan than a lost file.
                    committed, written[:] = list(written), []
                    try:
                        connection.execute("commit")
                    except duckdb.Error:
                        written += committed
                        raise
                    return result
            except BaseException:
                _remove(written)
                raise

        try:
            with self._lock:
                return retried(once)
        except (OSError, duckdb.Error) as error:
            raise LakeError(
                f"Cannot write to the lake in {self.folder}: {said(error)}. "
                "Nothing of this commit was kept; mend that and run the command again."
            ) from error

    def _add(
        self, connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table, written: list[Path]
    ) -> None:
        if rows.num_rows > INLINED_ROWS or (name in ("rollouts", "echo_clips") and rows.num_rows):
            self._add_file(connection, name, rows, written)
        elif rows.num_rows:
            _insert(connection, name, rows)

    def _add_file(
        self, connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table, written: list[Path]
    ) -> None:
        path = (
            self.files / "main" / name / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}.parquet"
        )
        written.append(path)
        sha256 = write_data_file(rows, path)
        connection.execute("call ducklake_add_data_files('lake', ?, ?)", [name, str(path)])
        record = {
            "path": str(path.relative_to(self.folder)),
            "table_name": name,
            "sha256": sha256,
            "num_rows": rows.num_rows,
            "created_at": datetime.now(UTC),
        }
        _insert(connection, "files", pa.Table.from_pylist([record], schema.FILES))
        note_written(self.folder, {record["path"]: sha256})

    @contextmanager
    def maintained(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A session for upkeep, while no other writer of this machine writes."""
        try:
            with self._lock, session() as connection:
                retried(partial(self.catalog.attach, connection))
                yield connection
        except (OSError, duckdb.Error) as error:
            raise LakeError(
                f"Cannot tidy the lake in {self.folder}: {said(error)}. Mend that and run the command again."
            ) from error

    def held_snapshots(self) -> set[int]:
        """Those that sessions read at this moment because someone asked for them by number."""
        return held(self.folder)

    def delete_orphans(self, older_than: timedelta = timedelta(hours=1), dry_run: bool = False) -> int:
        """Deletes data files that no snapshot names: a writer was killed between file and commit.

        Returns:
            how many there were. Younger files stay: their commit may be under way.
        """
        oldest = datetime.now(UTC) - older_than
        with self.maintained() as connection:
            deleted = connection.execute(
                "call ducklake_delete_orphaned_files('lake', older_than => ?, dry_run => ?)",
                [oldest, dry_run],
            ).fetchall()
            unfinished = [p for p in self.files.rglob(".*.partial") if p.stat().st_mtime < oldest.timestamp()]
            if not dry_run:
                _remove(unfinished)
        return len(deleted) + len(unfinished)


def _new_rows(connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> pa.Table:
    """The rows whose key is neither in the table nor earlier in `rows`."""
    if not rows.num_rows:
        return rows
    keys = ", ".join(f'"{key}"' for key in schema.KEYS[name])
    numbered = rows.select(list(schema.KEYS[name])).append_column(
        "nth_incoming", pa.array(range(rows.num_rows))
    )
    connection.register("incoming", numbered)
    same = " and ".join(f'held."{key}" is not distinct from incoming."{key}"' for key in schema.KEYS[name])
    # A key column of one value, such as a mining's name, spares the files that cannot hold it.
    shared = {key: values[0] for key in schema.KEYS[name] if len(values := rows[key].unique()) == 1}
    shared = {key: value.as_py() for key, value in shared.items() if value.is_valid}
    here = "".join(f' and held."{key}" = ${key}' for key in shared)
    fresh = connection.execute(
        f"""
        select min(nth_incoming) as nth_incoming from incoming
        where not exists (select 1 from "{name}" as held where {same}{here})
        group by {keys} order by 1
        """,
        shared,
    ).to_arrow_table()
    connection.unregister("incoming")
    return rows.take(fresh["nth_incoming"])


def _note_spanning_groups(connection: duckdb.DuckDBPyConnection, rows: pa.Table) -> None:
    """Names in `meta` the runs of each group of `rows` that lies in several, where that is news."""
    connection.register("incoming", rows.select(["group_id", "run_id"]))
    connection.execute(
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
    connection.unregister("incoming")


def _insert(connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    connection.register("incoming", rows)
    connection.execute(f'insert into "{name}" by name from incoming')
    connection.unregister("incoming")


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
