"""Keeping a lake small and quick: merge small files, expire old snapshots, delete what nothing names.

Each part is a transaction of its own, may be stopped anywhere and run again, and takes its turn with
writers. Readers go on: files that were merged away, and snapshots that were the newest not long ago,
stay for `grace_hours`; a session on an older snapshot holds it (`Lake.reader`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from pipeline import schema, verified
from pipeline.config import MaintainConfig
from pipeline.errors import LakeError
from pipeline.hashing import file_sha256
from pipeline.holds import held
from pipeline.lake import Lake
from pipeline.lake_upkeep import delete_orphans, maintained
from pipeline.parquet import ROW_GROUP_ROWS
from pipeline.run_notes import noted_at, noted_runs, read_notes
from pipeline.sqlfiles import sql_file

MIB = 2**20
# DuckDB then writes what `write_data_file` writes: version 2 splits floats into byte streams, also in
# lists, and packs the differences of integers; zstd's first level suits the streams best.
PARQUET_OPTIONS = {
    "parquet_compression": "zstd",
    "parquet_compression_level": "1",
    "parquet_version": "2",
    "parquet_row_group_size": str(ROW_GROUP_ROWS),
    "target_file_size": "256MB",
}


@dataclass(frozen=True)
class Maintained:
    """What was done, or would be.

    Attributes:
        merged_files: small files whose rows went into others.
        hashed_files: files whose SHA-256 was recorded: those that were written by merging.
        deleted_files: files that no snapshot names any more, after their grace.
        orphaned_files_deleted: files that killed writers left behind.
    """

    merged_files: int
    hashed_files: int
    expired_snapshots: int
    deleted_files: int
    orphaned_files_deleted: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def maintain(lake: Lake, config: MaintainConfig, dry_run: bool = False) -> Maintained:
    """Merges, expires and cleans.

    Raises:
        LakeError: a file that would be merged is damaged, or the lake cannot be written.
    """
    merged = merge_small_files(lake, config, dry_run)
    hashed = record_merged_files(lake, dry_run)
    expired = expire_snapshots(lake, config, dry_run)
    deleted, orphans = delete_unnamed_files(lake, config, dry_run)
    return Maintained(merged, hashed, expired, deleted, orphans)


def merge_small_files(lake: Lake, config: MaintainConfig, dry_run: bool = False) -> int:
    """Rewrites neighbouring small files as one; each row keeps the snapshot that it came with.

    Returns:
        how many files were merged into others.

    Raises:
        LakeError: one of them is damaged: merged, it would count as sound from then on.
    """
    limit = config.merge_below_mib * MIB
    with lake.reader() as reader:
        small = {path for path in reader.data_files() if _num_bytes(lake.folder / path) < limit}
        if not _mergeable(small):
            return 0
        if dry_run:
            return len(small)
        damaged = reader.verification(everything=True, only=small).damaged()
    if damaged:
        raise LakeError(
            f"{damaged[0].path} in {lake.folder} {damaged[0].problem} ({len(damaged)} such files). "
            "Restore it from a backup, or set it aside with `echomine doctor --set-aside`, then run "
            "`echomine maintain` again; nothing was merged."
        )
    with maintained(lake) as connection:
        for option, value in PARQUET_OPTIONS.items():
            connection.execute("call ducklake_set_option('lake', ?, ?)", [option, value])
        done = connection.execute(
            "call ducklake_merge_adjacent_files('lake', max_file_size => ?)", [limit]
        ).fetchall()
    return sum(num_files for _, _, num_files, _ in done)


def _num_bytes(path: Path) -> int:
    """A missing file counts as a small one, so that it is found damaged."""
    return path.stat().st_size if path.exists() else 0


def _mergeable(paths: set[str]) -> bool:
    """Whether a table has more than one of them."""
    return any(n > 1 for n in Counter(Path(path).parent for path in paths).values())


def record_merged_files(lake: Lake, dry_run: bool = False) -> int:
    """Records the SHA-256 of data files that have none: merging wrote them, and cannot say it in its commit.

    Returns:
        how many there were.
    """
    with lake.reader() as reader:
        unrecorded = reader.unrecorded_files()
    if dry_run or not unrecorded:
        return len(unrecorded)
    try:
        rows = [
            {
                "path": path,
                "table_name": table,
                "sha256": file_sha256(lake.folder / path),
                "num_rows": num_rows,
                "created_at": datetime.now(UTC),
            }
            for path, table, num_rows in unrecorded
        ]
    except OSError as error:
        raise LakeError(
            f"Cannot record the files of the lake in {lake.folder} that a merge wrote: {error}. "
            "Restore it from a backup, or set it aside with `echomine doctor --set-aside`, then run "
            "`echomine maintain` again."
        ) from error
    lake.commit({"files": pa.Table.from_pylist(rows, schema.FILES)})
    verified.note_written(lake.folder, {str(row["path"]): str(row["sha256"]) for row in rows})
    return len(rows)


def expire_snapshots(lake: Lake, config: MaintainConfig, dry_run: bool = False) -> int:
    """Forgets snapshots that nobody needs.

    Kept are the first and the newest, those that were the newest within `grace_hours`, those that a mining,
    a training or a night of the last `retention_days` names, those that a session reads, and for each of
    them the last that changed the rollouts.

    Returns:
        how many were forgotten.
    """
    with maintained(lake) as connection:
        with lake.reader() as reader:
            history = reader.history()
            since = datetime.now(UTC) - timedelta(days=config.retention_days)
            named = reader.rows(sql_file("maintenance/named_snapshots"), {"named_since": since})
        kept = {history[0]["snapshot"], history[-1]["snapshot"]}
        kept |= {row["snapshot"] for row in named} | set(_nights(lake, since)) | held(lake.folder)
        recent = datetime.now(UTC) - timedelta(hours=config.grace_hours)
        for row, after in pairwise(history):
            if after["created_at"] >= recent:
                kept.add(row["snapshot"])
        last_change = None
        for row in history:
            if row["changed_rollouts"]:
                last_change = row["snapshot"]
            if row["snapshot"] in kept and last_change is not None:
                kept.add(last_change)
        expired = [row["snapshot"] for row in history if row["snapshot"] not in kept]
        if expired and not dry_run:
            connection.execute("call ducklake_expire_snapshots('lake', versions => ?)", [expired])
    return len(expired)


def _nights(lake: Lake, since: datetime) -> Iterator[int]:
    """The snapshots that recent nights have noted to mine; one that was killed goes on from there."""
    for folder in noted_runs(lake.folder):
        facts = read_notes(folder)
        recent = noted_at(folder) >= since.timestamp()
        if facts.get("snapshot") is not None and (recent or not facts.get("done")):
            yield int(facts["snapshot"])


def delete_unnamed_files(lake: Lake, config: MaintainConfig, dry_run: bool = False) -> tuple[int, int]:
    """Deletes data files that no snapshot names.

    Returns:
        how many were merged away or expired at least `grace_hours` ago, and how many writers left behind
        that were killed over an hour ago.
    """
    oldest = datetime.now(UTC) - timedelta(hours=config.grace_hours)
    with maintained(lake) as connection:
        deleted = connection.execute(
            "call ducklake_cleanup_old_files('lake', older_than => ?, dry_run => ?)", [oldest, dry_run]
        ).fetchall()
    if deleted and not dry_run:
        verified.forget(lake.folder, [str(Path(path).relative_to(lake.folder)) for (path,) in deleted])
    return len(deleted), delete_orphans(lake, dry_run=dry_run)
