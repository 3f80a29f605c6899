"""Upkeep of a lake's files and snapshots: what only the catalog can do, in sessions of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import duckdb

from pipeline.catalog import retried, session
from pipeline.errors import LakeError, said
from pipeline.lake import Lake


@contextmanager
def maintained(lake: Lake) -> Iterator[duckdb.DuckDBPyConnection]:
    """A session for upkeep, while no other writer of this machine writes.

    Raises:
        LakeError: the lake cannot be written.
    """
    try:
        with lake.alone(), session() as connection:
            retried(partial(lake.catalog.attach, connection))
            yield connection
    except (OSError, duckdb.Error) as error:
        raise LakeError(
            f"Cannot tidy the lake in {lake.folder}: {said(error)}. Mend that and run the command again."
        ) from error


def delete_orphans(lake: Lake, older_than: timedelta = timedelta(hours=1), dry_run: bool = False) -> int:
    """Deletes data files that no snapshot names: a writer was killed between file and commit.

    Returns:
        how many there were. Younger files stay: their commit may be under way.

    Raises:
        LakeError: the lake cannot be written.
    """
    oldest = datetime.now(UTC) - older_than
    with maintained(lake) as connection:
        deleted = connection.execute(
            "call ducklake_delete_orphaned_files('lake', older_than => ?, dry_run => ?)",
            [oldest, dry_run],
        ).fetchall()
        unfinished = list(_unfinished(lake, oldest))
        for path in () if dry_run else unfinished:
            path.unlink(missing_ok=True)
    return len(deleted) + len(unfinished)


def _unfinished(lake: Lake, older_than: datetime) -> Iterator[Path]:
    """Data files, and notes of verified ones, whose writer was killed while it wrote them."""
    for path in [*lake.files.rglob(".*.partial"), *lake.folder.glob(".*.partial")]:
        try:
            written = path.stat().st_mtime
        except FileNotFoundError:  # it was renamed: its writer lives
            continue
        if written < older_than.timestamp():
            yield path


def end_older_snapshots(lake: Lake) -> None:
    """From here on only the newest snapshot is known, and the files that only older ones named are gone.

    Files that no snapshot names go too, however young: call it while no other writer commits (`Lake.alone`).

    Raises:
        LakeError: the lake cannot be written.
    """

    def once() -> None:
        with session() as connection:
            lake.catalog.attach(connection)
            for action in (
                "ducklake_rewrite_data_files('lake', delete_threshold => 0)",  # drops those without rows
                "ducklake_expire_snapshots('lake', older_than => now())",
                "ducklake_cleanup_old_files('lake', cleanup_all => true)",
                "ducklake_delete_orphaned_files('lake', cleanup_all => true)",
            ):
                connection.execute(f"call {action}")
        for path in list(lake.files.rglob(".*.partial")):
            path.unlink(missing_ok=True)

    try:
        retried(once)
    except (OSError, duckdb.Error) as error:
        raise LakeError(
            f"Cannot end the older snapshots of the lake in {lake.folder}: {said(error)}. "
            "Mend that and run the command again."
        ) from error
