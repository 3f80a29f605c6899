"""Forgetting prompts: their rollouts, clips and every text of theirs leave the lake's files for good.

A snapshot that still held them would keep their bytes, so all older snapshots end. What remains are hashes
(`forgotten_prompts`), by which a later import or night of the same prompt is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline import schema, set_aside
from pipeline.errors import BusyError
from pipeline.forgetting import COLUMNS, Forgetting, find
from pipeline.imports.staging import remove_abandoned
from pipeline.lake import Lake
from pipeline.lake_writer import Writer
from pipeline.parquet import write_data_file
from pipeline.removal import purge_catalog, recount_minings, refuse_other_catalogs, remove_rows
from pipeline.run_notes import read_notes, write_notes
from pipeline.withdrawal import TouchedShard, notice_shards


@dataclass(frozen=True)
class Forgot:
    """What went and what is left.

    Attributes:
        rows: number removed, by table.
        shards: exported files that hold clips of the prompts.
        trainings: whose weights have learned from such clips.
        reports: deleted, because they may have shown the text.
        set_aside: damaged data files that were set aside, which may hold the text and cannot be searched.
    """

    prompts: int
    rows: dict[str, int]
    shards: list[TouchedShard]
    trainings: list[str]
    reports: list[str]
    set_aside: list[str]


def forget(lake: Lake, names: list[str]) -> Forgot:
    """Removes prompts from the lake, all its files and all its snapshots; older snapshots end.

    Started again after it was killed, it finishes. What was read before and is committed afterwards, by a
    scoring, a verification or an import, is kept out by the commits themselves.

    Args:
        names: as of `find`.

    Raises:
        BusyError: a night or an import is running.
        PromptError: as `find`; then nothing was removed.
        LakeError: the lake cannot be written.
    """
    refuse_other_catalogs(lake)
    night = FileLock(lake.folder / "nightly.lock")
    try:
        night.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"A night is running on the lake in {lake.folder}. Wait until it is done, then forget."
        ) from None
    try:
        with lake.alone():
            _remove_staging(lake)
            found = find(lake, names)
            with lake.reader() as reader:
                shards = notice_shards(reader, found.clips, "forgotten")
            keys = {name: (COLUMNS[name], values) for name, values in found.keys.items()}
            remembered = _remembered(found)

            def change(writer: Writer) -> dict[str, int]:
                rows = remove_rows(writer, keys, remembered)
                recount_minings(writer, {mining: len(clips) for mining, clips in found.clips.items()})
                return rows

            rows = lake.changed(change)
            reports = _tidy_runs(lake, found)
            purge_catalog(lake)
    finally:
        night.release()
    return Forgot(len(found.prompt_ids), rows, shards, found.trainings, reports, _set_aside(lake))


def _remove_staging(lake: Lake) -> None:
    """Deletes what killed imports left: the rows of their dumps in plain text."""
    if remove_abandoned(lake.folder):
        raise BusyError(
            f"An import into the lake in {lake.folder} is running. Wait until it is done, then forget."
        )


def _set_aside(lake: Lake) -> list[str]:
    files = (lake.folder / set_aside.FOLDER).rglob("*")
    return sorted(str(path) for path in files if path.is_file() and path.parent.name in COLUMNS)


def _remembered(found: Forgetting) -> pa.Table:
    now = datetime.now(UTC)
    return pa.Table.from_pylist(
        [
            {"fingerprint": fingerprint, "kind": kind, "prompt_id": prompt_id, "forgotten_at": now}
            for kind, fingerprint, prompt_id in sorted(found.fingerprints)
        ],
        schema.FORGOTTEN_PROMPTS,
    )


def _tidy_runs(lake: Lake, found: Forgetting) -> list[str]:
    """Takes the prompts out of what nights left: staged batches and reports; returns the reports deleted."""
    reports = []
    for folder in (lake.folder / "runs").glob("*"):
        for staged in (folder / "staging").glob("*.parquet"):
            table = pq.read_table(staged)
            kept = table.filter(
                pc.invert(pc.is_in(table["prompt_id"], pa.array(sorted(found.prompt_ids), pa.string())))
            )
            if not kept.num_rows:
                staged.unlink()
            elif kept.num_rows < table.num_rows:
                write_data_file(kept, staged)
        notes = read_notes(folder)
        for report in folder.glob("report*.html") if folder.name in found.runs else ():
            report.unlink()
            reports.append(str(report))
        if notes:  # the snapshot that a night noted ends now
            write_notes(folder, notes | {"snapshot": None})
    return sorted(reports)
