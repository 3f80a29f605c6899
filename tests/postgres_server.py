"""A PostgreSQL server of the tests' own: Debian's, started as a user that is not root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USER = "echomine"
PASSWORD = "secret"


def programs() -> Path | None:
    """The folder of the server's programs, or None where it is not installed."""
    newest = max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    found = newest or shutil.which("initdb")
    return Path(found).resolve().parent if found else None


@dataclass(frozen=True)
class Server:
    """A running server: anyone may enter by its socket, by TCP only who knows the password."""

    folder: Path
    port: int

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={self.folder}&port={self.port}"

    def url_by_tcp(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def execute(self, sql: str, database: str = "postgres") -> str:
        """What psql prints for `sql`, columns between bars."""
        command = [
            "psql",
            "-qAt",
            "-h",
            str(self.folder),
            "-p",
            str(self.port),
            "-U",
            USER,
            "-c",
            sql,
            database,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def running(bin_folder: Path) -> Iterator[Server]:
    # pytest's own folders are closed to other users
    folder = Path(tempfile.mkdtemp(prefix="echomine-postgres-"))
    root = os.getuid() == 0
    as_other = ["runuser", "-u", "postgres", "--"] if root else []
    (folder / "password").write_text(PASSWORD)
    if root:
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [*as_other, str(bin_folder / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    try:
        secured = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={folder / 'password'}"]
        run("initdb", "-U", USER, "--no-sync", "--encoding=UTF8", "--locale=C", *secured)
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "start", "-w", "-s", "-l", str(folder / "log"), "-o", options)
        try:
            yield Server(folder, port)
        finally:
            run("pg_ctl", "stop", "-s", "-m", "immediate")
    finally:
        shutil.rmtree(folder)
