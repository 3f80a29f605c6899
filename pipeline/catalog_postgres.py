"""A lake's catalog in a PostgreSQL database, for several machines that write to one lake.

The lake's folder, which all of them mount, holds the data files and `catalog.url`: one line, the
database's address without a password. One database holds one lake.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import duckdb

from pipeline.catalog import Catalog, attach_sql, load_extension, newest_snapshot, quoted, session
from pipeline.errors import LakeError, nearest, said

MARKER = "catalog.url"
CONNECT_SECONDS = 10
# What an address may say beside host, port, user and database. libpq knows more, but a lake that comes
# from elsewhere shall not name files of this machine or run commands on the server.
_OPTIONS = {"host", "port", "user", "dbname", "service", "sslmode", "sslrootcert", "connect_timeout"}

# The lock goes with its transaction, so also with a writer that is killed. An administrator's limit on
# idle transactions must not end it during a long commit, a machine that vanished must not hold it for long.
_TAKE_TURN = """
select
    set_config('idle_in_transaction_session_timeout', '0', true) as may_wait,
    set_config('tcp_keepalives_idle', '30', true) as seconds_before_probes,
    set_config('tcp_keepalives_interval', '10', true) as seconds_between_probes,
    pg_advisory_xact_lock(hashtext('echomine lake'))::text as taken
"""

_CURES = (
    (r"password|authentication failed", "Give it in PGPASSWORD or in ~/.pgpass"),
    (r'database "[^"]*" does not exist', "Make it with `createdb`, or mend the address"),
    (r"role .* does not exist", "Name another user in the address, or make this one with `createuser`"),
    (r"permission denied", "Grant it to the address's user"),
    (r"invalid (uri|connection|sslmode|integer)|definition of service", "Mend the address"),
    (r"ducklake_snapshot", "It holds no lake: restore it from a backup, or mend the address"),
)


def postgres_url(text: str) -> str:
    """The address `text`, checked, with a limit on how long to wait for the server.

    Raises:
        LakeError: it is no PostgreSQL address, holds a password, or an option that a lake may not set.
    """
    form = "Give postgresql://user@host:5432/database."
    try:
        parts = urlsplit(text.strip())
        password, _ = parts.password, parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise LakeError(f"The catalog's address cannot be read: {said(error)}. {form}") from None
    if parts.scheme not in ("postgresql", "postgres") or re.search(r"\s", text.strip()):
        raise LakeError(f"The catalog's address {_shown(text)!r} is none of PostgreSQL. {form}")
    if password is not None or "password" in options:
        raise LakeError(
            "Leave the password out of the catalog's address, which is kept in the lake's folder; "
            "give it in PGPASSWORD or in ~/.pgpass."
        )
    for name in options.keys() - _OPTIONS:
        raise LakeError(f"The catalog's address has the unknown option `{name}`: {nearest(name, _OPTIONS)}")
    if not (parts.path.strip("/") or options.keys() & {"dbname", "service"}):
        raise LakeError(f"The catalog's address {_shown(text)} names no database. {form}")
    query = urlencode({"connect_timeout": CONNECT_SECONDS} | options, safe="/")
    # An empty host is written out: without `//` libpq would not know the scheme.
    return f"{parts.scheme}://{parts.netloc}{urlunsplit(('', '', parts.path, query, ''))}"


def _shown(text: str) -> str:
    return re.sub(r":[^:@/]*@", ":…@", text.strip())


@dataclass(frozen=True)
class PostgresCatalog(Catalog):
    """A PostgreSQL database; its writers, on whatever machine, take turns by a lock in it."""

    url: str
    files: Path

    @classmethod
    def of(cls, marker: Path, files: Path) -> PostgresCatalog:
        """The catalog that a lake's `catalog.url` names."""
        try:
            return cls(postgres_url(marker.read_text(encoding="utf-8")), files)
        except (OSError, UnicodeDecodeError) as error:
            raise LakeError(f"{marker} cannot be read: {said(error)}. Mend it.") from error
        except LakeError as error:
            raise LakeError(f"{marker}: {error}") from None

    @property
    def where(self) -> str:
        return self.url.split("?")[0]

    def exists(self) -> bool:
        return True  # the folder's marker is written last; were the database empty now, it was lost

    def create(self, make_tables: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        with session() as connection:
            self.attach(connection)
            tables = "select table_name from duckdb_tables() where database_name = 'lake'"
            there = {name for (name,) in connection.execute(tables).fetchall()}
            if there and "mining_runs" not in there:
                raise LakeError(
                    f"The database {self.where} holds a DuckLake that is none of EchoMine's. Give another."
                )
            if not there:
                make_tables(connection)
                connection.execute("commit")

    def attach(
        self, connection: duckdb.DuckDBPyConnection, *options: str, snapshot: int | None = None
    ) -> None:
        load_extension(connection, "postgres")
        super().attach(connection, *options, snapshot=snapshot)

    def attach_sql(self, *options: str, snapshot: int | None = None) -> str:
        return attach_sql(f"postgres:{self.url}", self.files, *options, snapshot=snapshot)

    def newest_snapshot(self, connection: duckdb.DuckDBPyConnection) -> int:
        load_extension(connection, "postgres")
        return newest_snapshot(connection, self.url, "postgres")

    def turn(self) -> AbstractContextManager[object]:
        return Turn(self.url)

    def unreadable(self, error: duckdb.Error) -> str:
        # libpq's sentence alone, without DuckDB's before it and its own question after it
        text = re.sub(
            r'^.*?Unable to connect to Postgres at "[^"]*": |\s*Is the server running.*$',
            "",
            str(error),
            flags=re.DOTALL,
        )
        cures = (cure for pattern, cure in _CURES if re.search(pattern, text, re.IGNORECASE))
        cure = next(cures, "Start the server, or mend the address")
        marker = self.files.with_name(MARKER)
        place = f" The address stands in {marker}." if marker.exists() else ""
        return f"The catalog {self.where} cannot be read: {said(Exception(text))}. {cure}.{place}"


@dataclass
class Turn:
    """A lock in the database: held by one writer at a time; who holds it may take it again."""

    url: str
    _mine: threading.RLock = field(default_factory=threading.RLock)
    _depth: int = 0
    _held: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Turn:
        self._mine.acquire()
        try:
            if self._depth == 0:
                self._take()
            self._depth += 1
        except BaseException:
            self._mine.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        try:
            if self._depth == 0:
                self._held.close()
        finally:
            self._mine.release()

    def _take(self) -> None:
        with ExitStack() as stack:
            # A session apart: it holds the lock while others commit.
            connection = stack.enter_context(session())
            load_extension(connection, "postgres")
            connection.execute(f"attach '{quoted(self.url)}' as newest (type postgres, read_only)")
            connection.execute("begin")
            stack.callback(_let_go, connection)
            connection.execute("from postgres_query('newest', ?)", [_TAKE_TURN]).fetchall()
            self._held = stack.pop_all()


def _let_go(connection: duckdb.DuckDBPyConnection) -> None:
    # Said explicitly: a rollback that fails while a session is closed ends the process (postgres 1.5.5).
    # Where it fails the connection was lost, and the server let go of the lock by then.
    with suppress(duckdb.Error):
        connection.execute("rollback")


def write_marker(folder: Path, url: str) -> None:
    """Notes in the lake's folder where its catalog is, in one step."""
    marker = folder / MARKER
    partial = marker.with_name(f".{MARKER}.{os.getpid()}.partial")
    partial.write_text(url + "\n", encoding="utf-8")
    partial.replace(marker)
