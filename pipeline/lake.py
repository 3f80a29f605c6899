"""The rollout lake: plain Parquet files plus a SQL catalog (DuckLake), versioned and transactional.

    lake/catalog.sqlite   the catalog; or lake/catalog.url, which names a PostgreSQL database
    lake/files/           data files
    lake/runs/            what nights leave behind: reports, metrics, checkpoints, shards

Writers take turns (a lock around each commit, of the machine or the database); readers never wait and
never see half a commit. Every commit is a snapshot that can be queried again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa

from pipeline import schema
from pipeline.catalog import Catalog, SqliteCatalog, retried, session
from pipeline.catalog_postgres import MARKER, PostgresCatalog, postgres_url, write_marker
from pipeline.errors import LakeError, said
from pipeline.holds import hold
from pipeline.lake_reader import Reader
from pipeline.lake_writer import Writer, make_tables, transaction

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
            lake.changed(Writer.migrate)
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
                        lake.catalog.create(make_tables)
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
                catalog.create(make_tables)
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
        return self.changed(lambda writer: writer.append(tables))

    def replace_rollouts(self, rows: pa.Table, scorings: pa.Table) -> int:
        """Puts rows in the place of those of the same rollout_id, and notes who scored them, all or nothing.

        Earlier snapshots keep the old rows; a mining of the new one is another mining.

        Returns:
            how many were replaced; rows whose rollout is no longer there are left out.

        Raises:
            LakeError: the lake cannot be written; then the old rows stay.
        """
        return self.changed(lambda writer: writer.replace_rollouts(rows, scorings))

    def touch_mining(self, mining_id: str) -> None:
        """Makes a recorded mining the newest: it was asked for again, so its clips are wanted now."""

        def change(writer: Writer) -> None:
            writer.begin()
            writer.connection.execute(
                "update mining_runs set created_at = now() where mining_id = ? "
                "and created_at < (select max(created_at) from mining_runs)",
                [mining_id],
            )

        self.changed(change)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other writer of this machine commits meanwhile; who is alone may commit.

        Raises:
            LakeError: the lake cannot be written.
        """
        with ExitStack() as turn:
            try:
                retried(lambda: turn.enter_context(self._lock))
            except (OSError, duckdb.Error) as error:
                raise self._unwritable(error) from error
            yield

    def changed(self, change: Callable[[Writer], Result]) -> Result:
        """Commits what `change` does, while no other writer of this machine writes.

        Args:
            change: begins a transaction.

        Raises:
            LakeError: the lake cannot be written; then nothing of the change is in it.
        """

        def in_turn() -> Result:
            with self._lock:
                return transaction(self.catalog, self.folder, change)

        try:
            return retried(in_turn)
        except (OSError, duckdb.Error) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> LakeError:
        return LakeError(
            f"Cannot write to the lake in {self.folder}: {said(error)}. "
            "Nothing of this commit was kept; mend that and run the command again."
        )
