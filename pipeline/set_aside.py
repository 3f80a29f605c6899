"""Damaged data files, set aside: out of the newest snapshot and into `lake/damaged/`, so that work goes on.

DuckLake deletes rows that it has read, and a damaged file cannot be read. Its catalog is a documented set of
SQL tables, so the file is ended there, in one transaction, as a deletion of all its rows ends it. Killed
anywhere, run again it finishes: a file is moved first, which damages the lake no further; the catalog's
transaction carries what `quarantine` is to say; and what it lacks of that is added last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import verified
from pipeline.errors import LakeError
from pipeline.lake import Lake
from pipeline.lake_reader import DATA_FILES, Reader
from pipeline.lake_upkeep import maintained
from pipeline.quarantine import Refused, quarantine_table

MESSAGE = "damaged data files set aside"  # the catalog's commit message, by which such snapshots are known
FOLDER = "damaged"  # in the lake's
_CATALOG = "__ducklake_metadata_lake"


@dataclass(frozen=True)
class SetAside:
    """A damaged or missing data file.

    Attributes:
        path: where it was, relative to the lake's folder.
        table: whose rows it held.
        problem: what is wrong with it.
        num_rows: that it held.
        first_run: the first and last run, by name, of its rows; None where the table has no runs.
        kept: where it is now, relative to the lake's folder; None if it was missing.
        sha256: what it was written with; None if that was never recorded.
    """

    path: str
    table: str
    problem: str
    num_rows: int
    first_run: str | None
    last_run: str | None
    kept: str | None
    sha256: str | None


def set_aside(lake: Lake) -> list[SetAside]:
    """Takes every damaged or missing data file, of whatever table, out of the newest snapshot.

    Nothing is deleted. Snapshots from before still name the files and cannot read them, unless they are put
    back from a backup.

    Raises:
        LakeError: a file cannot be moved, or the catalog cannot be written; run it again then.
    """
    with lake.reader() as reader:
        suspects = {file.path for file in reader.verification(everything=True).damaged()}
    with lake.alone():
        with lake.reader() as reader:  # it may be merged away or restored by now
            still = suspects & reader.data_files()
            damaged = reader.verification(everything=True, only=still).damaged()
            facts = _facts(reader, [file.path for file in damaged])
        files, ids = list[SetAside](), list[int]()
        for file in damaged:
            fact = facts[file.path]
            kept = _moved(lake.folder, file.path)
            problem = verified.CHANGED if kept else file.problem
            ids.append(fact.pop("data_file_id"))
            files.append(SetAside(path=file.path, problem=problem, kept=kept, **fact))
        if files:
            _end(lake, files, ids)
            verified.forget(lake.folder, [file.path for file in files])
        _quarantine(lake)
    return files


def _facts(reader: Reader, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the catalog says of data files, by path."""
    rows = reader.rows(
        f"""
        select path, data_file_id, table_name as "table", num_rows, first_run, last_run
        from ({DATA_FILES})
        where list_contains($paths, path)
        """,
        {"snapshot": reader.snapshot, "paths": list(paths)},
    )
    hashes = reader.recorded_hashes()
    return {row.pop("path"): row | {"sha256": hashes.get(path)} for row in rows for path in [row["path"]]}


def _moved(folder: Path, path: str) -> str | None:
    """Where the file is, relative to the lake's folder; None if there is none."""
    kept = folder / FOLDER / Path(path).relative_to("files")
    if not (folder / path).exists():
        return str(kept.relative_to(folder)) if kept.exists() else None  # moved before a kill
    name, number = kept.name, 1
    while kept.exists():
        number += 1
        kept = kept.with_name(f"{name}.{number}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / path, kept)
    except OSError as error:
        raise LakeError(
            f"Cannot move {folder / path} to {kept}: {error.strerror or error}. "
            "Mend that and run the command again; the catalog was not changed."
        ) from error
    return str(kept.relative_to(folder))


def _end(lake: Lake, files: Sequence[SetAside], ids: Sequence[int]) -> None:
    """A new snapshot without these data files; all or nothing."""
    note = json.dumps([asdict(file) for file in files])
    with maintained(lake) as connection:
        connection.execute("begin")
        connection.execute(
            f"""
            insert into {_CATALOG}.ducklake_snapshot
                (snapshot_id, snapshot_time, schema_version, next_catalog_id, next_file_id)
            select snapshot_id + 1, now(), schema_version, next_catalog_id, next_file_id
            from {_CATALOG}.ducklake_snapshot
            order by snapshot_id desc
            limit 1
            """
        )
        connection.execute(
            f"""
            insert into {_CATALOG}.ducklake_snapshot_changes
                (snapshot_id, changes_made, commit_message, commit_extra_info)
            select
                (select max(snapshot_id) from {_CATALOG}.ducklake_snapshot),
                string_agg(distinct 'deleted_from_table:' || table_id, ','),
                $message,
                $note
            from {_CATALOG}.ducklake_data_file
            where list_contains($ids, data_file_id)
            """,
            {"message": MESSAGE, "note": note, "ids": list(ids)},
        )
        for table in ("ducklake_data_file", "ducklake_delete_file"):
            connection.execute(
                f"""
                update {_CATALOG}.{table}
                set end_snapshot = (select max(snapshot_id) from {_CATALOG}.ducklake_snapshot)
                where end_snapshot is null and list_contains($ids, data_file_id)
                """,
                {"ids": list(ids)},
            )
        connection.execute("commit")


def _quarantine(lake: Lake) -> None:
    """Adds what `quarantine` does not yet say of files that were set aside."""
    with lake.reader() as reader:
        notes = reader.rows(
            "select commit_extra_info as note from ducklake_snapshots('lake') "
            "where commit_message = $message",
            {"message": MESSAGE},
        )
        files = [file for row in notes for file in json.loads(row["note"])]
        known = reader.rows(
            "select source from quarantine where list_contains($paths, source)",
            {"paths": [file["path"] for file in files]},
        )
    said = {row["source"] for row in known}
    refused = [_refused(SetAside(**file)) for file in files if file["path"] not in said]
    if refused:
        lake.commit({"quarantine": quarantine_table(refused)})


def _refused(file: SetAside) -> Refused:
    run = {"run_id": file.first_run} if file.first_run == file.last_run else {}
    return Refused(f"damaged data file: it {file.problem}", file.path, {**run, **asdict(file)})
