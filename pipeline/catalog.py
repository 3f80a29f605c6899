"""DuckDB sessions on a lake's catalog: how they are opened, attached, and tried again while it is busy."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import duckdb
from duckdb_extensions import import_extension

BUSY_TIMEOUT_MS = 30_000
RETRIES = 8
EXTENSIONS = ("ducklake", "sqlite")

SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    # The kernel keeps what was read of files; a second copy in here would outlive a file's damage.
    "enable_external_file_cache": False,
}

Result = TypeVar("Result")

# Loading the extensions takes longer than most queries, so finished sessions leave their instance here.
_idle: list[duckdb.DuckDBPyConnection] = []
os.register_at_fork(after_in_child=_idle.clear)  # an instance has threads, which a fork does not copy


@dataclass(frozen=True)
class Catalog:
    """Where a lake's catalog and its data files are."""

    path: Path
    files: Path

    def attach(
        self, connection: duckdb.DuckDBPyConnection, *options: str, snapshot: int | None = None
    ) -> None:
        """Makes the lake the session's database, under the name `lake`.

        Args:
            options: further options of DuckLake's `attach`.
            snapshot: pins the session to it, for reading.
        """
        # ATTACH takes no bound parameters: paths are quoted, numbers are formatted as integers.
        # The catalog notes where its data lay when it was made; the folder may have been moved since.
        settings = [
            f"meta_busy_timeout {BUSY_TIMEOUT_MS}",
            f"data_path '{quoted(self.files)}/'",
            "override_data_path true",
            *options,
        ]
        if snapshot is not None:
            settings.append(f"snapshot_version {int(snapshot)}")
        connection.execute(f"attach 'ducklake:sqlite:{quoted(self.path)}' as lake ({', '.join(settings)})")
        connection.execute("use lake")

    def newest_snapshot(self, connection: duckdb.DuckDBPyConnection) -> int:
        """The number of the last commit, read without attaching the lake."""
        connection.execute("detach database if exists newest")
        connection.execute(f"attach '{quoted(self.path)}' as newest (type sqlite, read_only)")
        row = connection.execute("select max(snapshot_id) from newest.ducklake_snapshot").fetchone()
        connection.execute("detach newest")
        assert row is not None
        return int(row[0])


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
        import_extension(extension, con=instance)  # from the installed package, never from the network
        instance.execute(f"load {extension}")
    return instance


def retried(action: Callable[[], Result]) -> Result:
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


def quoted(path: Path) -> str:
    """A path as the inside of a SQL string."""
    return str(path).replace("'", "''")
