"""The rollout lake: plain Parquet files plus a SQL catalog (DuckLake), versioned and transactional.

    lake/catalog.sqlite   the catalog; or lake/catalog.url, which names a PostgreSQL database
    lake/files/           data files
    lake/runs/            what nights leave behind: reports, metrics, checkpoints, shards

Writers take turns (a lock around each commit, of the machine or the database); readers never wait and
never see half a commit. Every commit is a snapshot that can be queried again.
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

from pipeline import schema
from pipeline.catalog import Catalog, SqliteCatalog, retried, session
from pipeline.catalog_postgres import MARKER, PostgresCatalog, postgres_url, write_marker
from pipeline.errors import LakeError, said
from pipeline.holds import held, hold
from pipeline.lake_reader import SPANNING_GROUP, Reader
from pipeline.parquet import write_data_file
from pipeline.verified import note_written

# Fewer rows are kept in the catalog itself (DuckLake's data inlining) instead of a tiny file each.
INLINED_ROWS = 1000
# What a mining reads or writes is in data files however small: their hashes and snapshots name the mining.
ALWAYS_FILES = ("rollouts", "echo_clips", "verdicts")
MERGED_FILE = "ducklake-"  # how the names of files begin that hold what other files held before
_DAMAGE = re.compile(r"magic bytes|corrupt|malformed|ZSTD|TProtocol|parquet metadata", re.IGNORECASE)

Result = TypeVar("Result")


class Lake:
    """One lake folder. Open with `Lake.create` to write, `Lake.open` to read or write an existing one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        marker = folder / MARKER
        self.catalog: Catalog = (
            PostgresCatalog.of(marker, self.files)
            if marker.is_file()
            else SqliteCatalog(folder / "catalog.sqlite", self.files)
        )
        self._lock = self.catalog.turn()

    @classmethod
    def open(cls, folder: Path) -> Lake:
        """An existing lake; one of an older schema gets the tables it lacks.

        Raises:
            LakeError: there is none, it is damaged, or it was made by a newer EchoMine.
        """
        lake = cls(folder.absolute())
        if not lake.catalog.exists():
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
    def create(cls, folder: Path, catalog_url: str | None = None) -> Lake:
        """The lake in `folder`, made if there is none yet.

        Args:
            catalog_url: the PostgreSQL database that holds or shall hold its catalog; by default a SQLite
                file in the folder, or what the folder says.

        Raises:
            LakeError: it cannot be made there, or the folder and the database belong to different lakes.
        """
        lake = cls(folder.absolute())
        try:
            lake.files.mkdir(parents=True, exist_ok=True)
            if catalog_url is not None:
                lake._join(PostgresCatalog(postgres_url(catalog_url), lake.files))
            else:
                with lake._lock:
                    if not lake.catalog.exists():
                        lake.catalog.create(_make_tables)
        except (OSError, duckdb.Error) as error:
            what = error.strerror if isinstance(error, OSError) else None
            raise LakeError(
                f"Cannot make or write a lake in {folder}: {what or said(error)}. "
                "Choose another folder with --lake, or mend its permissions."
            ) from error
        return cls.open(folder)

    def _join(self, catalog: PostgresCatalog) -> None:
        """Makes or takes over a catalog in a database for this folder, and notes it there."""
        if self.catalog.exists() and getattr(self.catalog, "url", None) != catalog.url:
            raise LakeError(
                f"The lake in {self.folder} has its catalog in {self.catalog.where}, and a catalog cannot be "
                "moved. Give the folder of a new lake with --lake."
            )
        self.catalog, self._lock = catalog, catalog.turn()
        try:
            with self._lock:
                catalog.create(_make_tables)
        except duckdb.Error as error:
            raise LakeError(catalog.unreadable(error)) from error
        with self.reader() as reader:
            known = reader.rows(
                "select path from files where not exists (from quarantine where source = path) "
                "order by created_at desc limit 1"
            )
        if known and not (self.folder / known[0]["path"]).exists():
            raise LakeError(
                f"The database {catalog.where} holds the catalog of a lake whose files are not in "
                f"{self.folder}: {known[0]['path']} is missing. Give the folder that its other machines use."
            )
        write_marker(self.folder, catalog.url)

    def _migrate(self) -> None:
        def change(connection: duckdb.DuckDBPyConnection, _written: list[Path]) -> None:
            connection.execute("begin")
            for table in schema.TABLES:
                connection.execute(schema.ddl(table))
            connection.execute(
                "update meta set value = ? where key = 'schema_version'", [str(schema.SCHEMA_VERSION)]
            )

        self.changed(change)

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
            raise LakeError(self.catalog.unreadable(error)) from error

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

        return self.changed(change)

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
            self.add_file(connection, "rollouts", rows, written)
            self._add(connection, "scorings", scorings, written)

        self.changed(change)

    def touch_mining(self, mining_id: str) -> None:
        """Makes a recorded mining the newest: it was asked for again, so its clips are wanted now."""

        def change(connection: duckdb.DuckDBPyConnection, _written: list[Path]) -> None:
            connection.execute("begin")
            connection.execute(
                "update mining_runs set created_at = now() where mining_id = ? "
                "and created_at < (select max(created_at) from mining_runs)",
                [mining_id],
            )

        self.changed(change)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other writer of this machine commits meanwhile."""
        with self._lock:
            yield

    def changed(self, change: Callable[[duckdb.DuckDBPyConnection, list[Path]], Result]) -> Result:
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
                        written += self._unnamed(committed)
                        raise
                    return result
            except BaseException:
                _remove(written)
                raise

        def in_turn() -> Result:
            with self._lock:
                return once()

        try:
            return retried(in_turn)
        except (OSError, duckdb.Error) as error:
            raise LakeError(
                f"Cannot write to the lake in {self.folder}: {said(error)}. "
                "Nothing of this commit was kept; mend that and run the command again."
            ) from error

    def _unnamed(self, files: list[Path]) -> list[Path]:
        """Those that the catalog does not name: a server's answer to a commit may be lost on the way."""
        try:
            with session() as connection:
                self.catalog.attach(connection, "read_only")
                named = connection.execute(
                    "select parse_filename(path) from __ducklake_metadata_lake.ducklake_data_file"
                ).fetchall()
        except duckdb.Error:
            return []  # unknown, so all are kept; `delete_orphans` finds those that no snapshot names
        return [path for path in files if (path.name,) not in named]

    def _add(
        self, connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table, written: list[Path]
    ) -> None:
        if rows.num_rows > INLINED_ROWS or (name in ALWAYS_FILES and rows.num_rows):
            self.add_file(connection, name, rows, written)
        elif rows.num_rows:
            _insert(connection, name, rows)

    def add_file(
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

    def end_older_snapshots(self) -> None:
        """From here on only the newest snapshot is known, and the files that only older ones named are gone.

        Files that no snapshot names go too, however young: call it while no other writer commits (`alone`).

        Raises:
            LakeError: the lake cannot be written.
        """

        def once() -> None:
            with session() as connection:
                self.catalog.attach(connection)
                for action in (
                    "ducklake_rewrite_data_files('lake', delete_threshold => 0)",  # drops those without rows
                    "ducklake_expire_snapshots('lake', older_than => now())",
                    "ducklake_cleanup_old_files('lake', cleanup_all => true)",
                    "ducklake_delete_orphaned_files('lake', cleanup_all => true)",
                ):
                    connection.execute(f"call {action}")
            _remove(list(self.files.rglob(".*.partial")))

        try:
            retried(once)
        except (OSError, duckdb.Error) as error:
            raise LakeError(
                f"Cannot end the older snapshots of the lake in {self.folder}: {said(error)}. "
                "Mend that and run the command again."
            ) from error

    def text_bounds(self) -> dict[tuple[str, str], tuple[str, str]]:
        """Smallest and greatest value of each text column that holds any, by (table, column)."""
        bounds = {}
        with self.reader() as reader:
            for name, columns in schema.TABLES.items():
                for column in (field.name for field in columns if field.type == pa.string()):
                    row = reader.rows(
                        f'select min("{column}") as a, max("{column}") as z from lake."{name}"'
                    )[0]
                    bounds[name, column] = row["a"], row["z"]
        return bounds


def _make_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Begins a transaction that makes all tables; the option before it is set at once."""
    connection.execute(f"call ducklake_set_option('lake', 'data_inlining_row_limit', '{INLINED_ROWS}')")
    connection.execute("begin")
    for table in schema.TABLES:
        connection.execute(schema.ddl(table))
    connection.execute("insert into meta values ('schema_version', ?)", [str(schema.SCHEMA_VERSION)])


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
    # A key column of one value, such as a mining's name, spares the files that cannot hold it. Not so a text
    # from outside: DuckLake pastes the value into a query of its catalog, which a NUL character cuts off.
    keys_of_ours = () if name == "quarantine" else schema.KEYS[name]
    shared = {key: values[0] for key in keys_of_ours if len(values := rows[key].unique()) == 1}
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
