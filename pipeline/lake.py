"""The rollout lake: plain Parquet files plus a SQL catalog (DuckLake), versioned and transactional.

    lake/catalog.sqlite   the catalog
    lake/files/           data files
    lake/runs/            what nights leave behind: reports, metrics, checkpoints, shards

Writers of one machine take turns (a file lock around each commit); readers never wait and never see
half a commit. Every commit is a snapshot that can be queried again.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
from duckdb_extensions import import_extension
from filelock import FileLock

from pipeline import schema
from pipeline.errors import LakeError, QueryError, said
from pipeline.hashing import file_sha256
from pipeline.parquet import write_data_file
from pipeline.query import Selection, reading_only
from pipeline.sqlfiles import macros, params_of, views

# Fewer rows are kept in the catalog itself (DuckLake's data inlining) instead of a tiny file each.
INLINED_ROWS = 1000
BUSY_TIMEOUT_MS = 30_000
RETRIES = 8
_DAMAGE = re.compile(r"magic bytes|corrupt|malformed|ZSTD|TProtocol|parquet metadata", re.IGNORECASE)

Result = TypeVar("Result")


@dataclass(frozen=True)
class DamagedFile:
    path: str
    problem: str


class Lake:
    """One lake folder. Open with `Lake.create` to write, `Lake.open` to read or write an existing one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = folder / "catalog.sqlite"
        self.files = folder / "files"
        self._lock = FileLock(folder / "write.lock")

    @classmethod
    def open(cls, folder: Path) -> Lake:
        """An existing lake; one of an older schema gets the tables it lacks.

        Raises:
            LakeError: there is none, it is damaged, or it was made by a newer EchoMine.
        """
        lake = cls(folder.absolute())
        if not lake.catalog.is_file():
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
                if not lake.catalog.exists():
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
        building = self.catalog.with_name(f"building-{uuid.uuid4().hex}.sqlite")
        connection = _connect()
        try:
            _attach(connection, building, self.files, "meta_journal_mode 'wal'")
            connection.execute("begin")
            for table in schema.TABLES:
                connection.execute(schema.ddl(table))
            connection.execute("insert into meta values ('schema_version', ?)", [str(schema.SCHEMA_VERSION)])
            connection.execute("commit")
            option = f"'data_inlining_row_limit', '{INLINED_ROWS}'"
            connection.execute(f"call ducklake_set_option('lake', {option})")
            connection.close()  # SQLite moves its journal into the file
            building.rename(self.catalog)
        finally:
            connection.close()
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
        connection = _connect()
        try:
            yield self._session(connection, snapshot)
        except duckdb.Error as error:
            # A damaged file has no exception of its own; what a wrong query raises stays as it is.
            if not isinstance(error, duckdb.IOException) and not _DAMAGE.search(str(error)):
                raise
            raise LakeError(
                f"The lake in {self.folder} cannot be read: {said(error)}. "
                "Run `echomine doctor` to see what is damaged."
            ) from error
        finally:
            connection.close()

    def _session(self, connection: duckdb.DuckDBPyConnection, snapshot: int | None) -> Reader:
        try:
            if snapshot is None:
                snapshot = _retried(lambda: _newest_snapshot(connection, self.catalog))
            _retried(lambda: _attach(connection, self.catalog, self.files, "read_only", snapshot))
            return Reader(connection, self, snapshot)
        except duckdb.Error as error:
            if "No snapshot found" in str(error):
                raise LakeError(
                    f"The lake in {self.folder} has no snapshot {snapshot}. "
                    'See `echomine sql "from snapshots"` for those it has.'
                ) from error
            raise LakeError(
                f"The catalog {self.catalog} cannot be read: {said(error)}. "
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
            connection, written = _connect(), list[Path]()
            try:
                _attach(connection, self.catalog, self.files)
                result = change(connection, written)
                try:
                    connection.execute("commit")
                except KeyboardInterrupt:
                    written.clear()  # it may have gone through: better an orphan than a lost file
                    raise
                return result
            except BaseException:
                _remove(written)
                raise
            finally:
                connection.close()

        try:
            with self._lock:
                return _retried(once)
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

    def delete_orphans(self, older_than: timedelta = timedelta(hours=1)) -> int:
        """Deletes data files that no snapshot names: a writer was killed between file and commit.

        Returns:
            how many there were. Younger files stay: their commit may be under way.
        """
        oldest = datetime.now(UTC) - older_than
        connection = _connect()
        try:
            with self._lock:
                _attach(connection, self.catalog, self.files)
                deleted = connection.execute(
                    "call ducklake_delete_orphaned_files('lake', older_than => ?)",
                    [oldest],
                ).fetchall()
                partial = [
                    p for p in self.files.rglob(".*.partial") if p.stat().st_mtime < oldest.timestamp()
                ]
                _remove(partial)
            return len(deleted) + len(partial)
        except (OSError, duckdb.Error) as error:
            raise LakeError(
                f"Cannot tidy the lake in {self.folder}: {said(error)}. Mend that and run the command again."
            ) from error
        finally:
            connection.close()

    def damaged_files(self, reader: Reader, since_snapshot: int = -1) -> list[DamagedFile]:
        """Data files added after `since_snapshot` that are missing or not as they were written."""
        damaged = []
        for row in reader.rows(
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
            path = self.folder / row["path"]
            if not path.is_file():
                damaged.append(DamagedFile(row["path"], "is missing"))
            elif file_sha256(path) != row["sha256"]:
                damaged.append(DamagedFile(row["path"], "is not as it was written (its SHA-256 differs)"))
        return damaged


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
        """The snapshot of the last change to `rollouts`: what a mining of this session really mines."""
        return int(
            self.rows(
                """
                select coalesce(max(data.begin_snapshot), 0) as snapshot
                from __ducklake_metadata_lake.ducklake_data_file as data
                join __ducklake_metadata_lake.ducklake_table as tables using (table_id)
                where tables.table_name = 'rollouts' and data.begin_snapshot <= $snapshot
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
        self.connection.execute(f"set allowed_directories = ['{_quoted(self.lake.files)}/']")
        self.connection.execute("set python_enable_replacements = false")  # our own variables are no tables
        self.connection.execute("set enable_external_access = false; set lock_configuration = true")
        self._locked = True


def _connect() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"autoinstall_known_extensions": False})
    for extension in ("ducklake", "sqlite"):
        import_extension(extension, con=connection)  # from the installed package, never from the network
        connection.execute(f"load {extension}")
    connection.execute("set timezone = 'UTC'; set enable_progress_bar = false")
    return connection


def _attach(
    connection: duckdb.DuckDBPyConnection,
    catalog: Path,
    data_path: Path,
    options: str = "",
    snapshot: int | None = None,
) -> None:
    # ATTACH takes no bound parameters: paths are quoted, numbers are formatted as integers.
    # The catalog notes where its data lay when it was made; the folder may have been moved since.
    settings = [
        f"meta_busy_timeout {BUSY_TIMEOUT_MS}",
        f"data_path '{_quoted(data_path)}/'",
        "override_data_path true",
    ]
    if snapshot is not None:
        settings.append(f"snapshot_version {int(snapshot)}")
    if options:
        settings.append(options)
    connection.execute(f"attach 'ducklake:sqlite:{_quoted(catalog)}' as lake ({', '.join(settings)})")
    connection.execute("use lake")


def _newest_snapshot(connection: duckdb.DuckDBPyConnection, catalog: Path) -> int:
    connection.execute("detach database if exists newest")
    connection.execute(f"attach '{_quoted(catalog)}' as newest (type sqlite, read_only)")
    row = connection.execute("select max(snapshot_id) from newest.ducklake_snapshot").fetchone()
    connection.execute("detach newest")
    assert row is not None
    return int(row[0])


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


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
    fresh = connection.execute(
        f"""
        select min(nth_incoming) as nth_incoming from incoming
        where not exists (select 1 from "{name}" as held where {same})
        group by {keys} order by 1
        """
    ).to_arrow_table()
    connection.unregister("incoming")
    return rows.take(fresh["nth_incoming"])


def _insert(connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    connection.register("incoming", rows)
    connection.execute(f'insert into "{name}" by name from incoming')
    connection.unregister("incoming")


def _retried(action: Callable[[], Result]) -> Result:
    """Runs `action` again, later and later, while another process holds the catalog."""
    for attempt in range(RETRIES):
        try:
            return action()
        except duckdb.Error as error:
            busy = re.search(r"database is locked|conflict|busy", str(error), re.IGNORECASE)
            if not busy or attempt == RETRIES - 1:
                raise
            time.sleep(0.05 * 2**attempt * (1 + random.random()))
    raise AssertionError("unreachable")


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
