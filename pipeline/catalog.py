"""DuckDB sessions on a lake's catalog: how they are opened, attached, and tried again while it is busy.

The catalog is a SQLite file in the lake's folder, or, for several writing machines, a PostgreSQL database
(`pipeline/catalog_postgres.py`).
"""

from __future__ import annotations

import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import duckdb
from duckdb_extensions import import_extension
from filelock import FileLock

from pipeline.errors import said

BUSY_TIMEOUT_MS = 30_000
RETRIES = 8
EXTENSIONS = ("ducklake", "sqlite")
# Another writer commits, or a PostgreSQL server was restarted under us.
_PASSING = re.compile(
    r"database is locked|conflict|busy|server closed the connection|terminating connection"
    r"|no connection to the server|connection has been closed|the database system is (starting|shutting)",
    re.IGNORECASE,
)

SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    # The kernel keeps what was read of files; a second copy in here would outlive a file's damage.
    "enable_external_file_cache": False,
}

Result = TypeVar("Result")

# Loading the extensions takes longer than most queries, so finished sessions leave their instance here.
_idle: list[duckdb.DuckDBPyConnection] = []


class Catalog(Protocol):
    """Where a lake's tables, snapshots and file names are kept."""

    @property
    def where(self) -> str:
        """What messages call it: a path, or an address without a password."""

    def exists(self) -> bool:
        """Whether there is a lake in it, without asking a server."""

    def create(self, make_tables: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        """Makes the catalog, all or nothing, while no other does; `make_tables` begins a transaction."""

    def attach(
        self, connection: duckdb.DuckDBPyConnection, *options: str, snapshot: int | None = None
    ) -> None:
        """Makes the lake the session's database, under the name `lake`; see `attach_sql`."""
        connection.execute(self.attach_sql(*options, snapshot=snapshot))
        connection.execute("use lake")

    def attach_sql(self, *options: str, snapshot: int | None = None) -> str:
        """The statement that attaches the lake.

        Args:
            options: further options of DuckLake's `attach`.
            snapshot: pins the session to it, for reading.
        """

    def newest_snapshot(self, connection: duckdb.DuckDBPyConnection) -> int:
        """The number of the last commit, read without attaching the lake."""

    def turn(self) -> AbstractContextManager[object]:
        """Held around each commit, so that writers take turns."""

    def unreadable(self, error: duckdb.Error) -> str:
        """What is wrong with the catalog and what to do, as the message of a `LakeError`."""


@dataclass(frozen=True)
class SqliteCatalog(Catalog):
    """A SQLite file; its writers take turns by a file lock beside it."""

    path: Path
    files: Path

    @property
    def where(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return self.path.is_file()

    def create(self, make_tables: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        # Built under another name, so that a crash leaves no half-made catalog behind.
        building = self.path.with_name(f"building-{uuid.uuid4().hex}.sqlite")
        try:
            with session() as connection:
                SqliteCatalog(building, self.files).attach(connection, "meta_journal_mode 'wal'")
                make_tables(connection)
                connection.execute("commit")
            building.rename(self.path)  # SQLite has moved its journal into the file by now
        finally:
            for left in building.parent.glob(f"{building.name}*"):
                left.unlink(missing_ok=True)

    def attach_sql(self, *options: str, snapshot: int | None = None) -> str:
        busy = f"meta_busy_timeout {BUSY_TIMEOUT_MS}"
        return attach_sql(f"sqlite:{self.path}", self.files, busy, *options, snapshot=snapshot)

    def newest_snapshot(self, connection: duckdb.DuckDBPyConnection) -> int:
        return newest_snapshot(connection, str(self.path), "sqlite")

    def turn(self) -> AbstractContextManager[object]:
        return FileLock(self.path.with_name("write.lock"))

    def unreadable(self, error: duckdb.Error) -> str:
        # SQLite reads with a file of its own beside the catalog, for which a full disk has no room
        no_disk = re.search("disk I/O error|disk is full", str(error))
        cure = "Is its disk full? If it is not, restore it" if no_disk else "Restore it"
        return (
            f"The catalog {self.path} cannot be read: {said(error)}. "
            f"{cure} from a backup; the data files beside it were not touched."
        )


def attach_sql(catalog: str, files: Path, *options: str, snapshot: int | None) -> str:
    """The statement that attaches the DuckLake whose catalog is named `catalog`."""
    # ATTACH takes no bound parameters: paths are quoted, numbers are formatted as integers.
    # The catalog notes where its data lay when it was made; the folder may have been moved since.
    settings = [f"data_path '{quoted(files)}/'", "override_data_path true", *options]
    if snapshot is not None:
        settings.append(f"snapshot_version {int(snapshot)}")
    return f"attach 'ducklake:{quoted(catalog)}' as lake ({', '.join(settings)})"


def newest_snapshot(connection: duckdb.DuckDBPyConnection, catalog: str, kind: str) -> int:
    """The last snapshot in a catalog of DuckDB's attachment type `kind`."""
    connection.execute("detach database if exists newest")
    connection.execute(f"attach '{quoted(catalog)}' as newest (type {kind}, read_only)")
    row = connection.execute("select max(snapshot_id) from newest.ducklake_snapshot").fetchone()
    connection.execute("detach newest")
    assert row is not None
    return int(row[0])


def _close_idle() -> None:
    while _idle:
        _idle.pop().close()


# An instance has threads, which a fork does not copy: closed in the child, it would wait for them.
os.register_at_fork(before=_close_idle)


@contextmanager
def session() -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection that shares its instance with no other, the extensions loaded."""
    try:
        instance = _idle.pop()
    except IndexError:
        instance = _instance()
    try:
        connection = instance.cursor()
        try:
            connection.execute("set timezone = 'UTC'; set enable_progress_bar = false")
            yield connection
        finally:
            connection.close()  # with it go its temporary relations and an unfinished transaction
        instance.execute("detach database if exists newest; detach database if exists lake")
        row = instance.execute("select current_setting('lock_configuration')").fetchone()
        if row is not None and not row[0]:  # a locked-down one would hold for the next session too
            _idle.append(instance)
            return
        instance.close()
    except BaseException:
        instance.close()
        raise


def _instance() -> duckdb.DuckDBPyConnection:
    instance = duckdb.connect(config=SETTINGS)
    for extension in EXTENSIONS:
        load_extension(instance, extension)
    return instance


def load_extension(connection: duckdb.DuckDBPyConnection, extension: str) -> None:
    """Loads an extension from its installed package, never from the network."""
    import_extension(extension, con=connection)
    connection.execute(f"load {extension}")


def retried(action: Callable[[], Result]) -> Result:
    """Runs `action` again, later and later, while another process holds the catalog or it is restarted."""
    for attempt in range(RETRIES):
        try:
            return action()
        except duckdb.Error as error:
            if not _PASSING.search(str(error)) or attempt == RETRIES - 1:
                raise
            time.sleep(0.05 * 2**attempt * (1 + random.random()))
    raise AssertionError("unreachable")


def quoted(text: Path | str) -> str:
    """A path or another text as the inside of a SQL string."""
    return str(text).replace("'", "''")
