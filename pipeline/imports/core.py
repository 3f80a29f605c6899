"""Dumps of rollouts into the lake: read once, staged on disk by group, committed group by group.

Memory holds one batch of the dumps or one part of the staged rows, however large the dumps are. Nothing is
committed before every file is read to its end; an import that was killed is simply run again, since a rollout
that is in the lake is not written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import formats, schema
from pipeline.forgotten import Forgotten
from pipeline.formats.source_rows import Format, check_file
from pipeline.hashing import content_id, file_sha256
from pipeline.imports.batches import batches
from pipeline.imports.context import ImportContext
from pipeline.imports.staging import ImportStaging, bytes_in_memory
from pipeline.ingest import Ingested, conflicts, ingest_table
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.lake_writer import Writer
from pipeline.quarantine import first_refusal
from pipeline.rollouts import named
from pipeline.sqlfiles import sql_file

_GIVEN = ("group_id", "sample_index", "group_size", "policy_version", "origin", "sample_id", "file", "nth")
_CONTENT = ("is_refused", "prompt_ids", "completion_ids", "reward")


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        rows: their numbers, and the first that was refused.
        run_ids: the runs that its rows are of.
        assumed: what the readers had to assume because the dumps do not say it; sentences.
    """

    rows: Ingested = field(default_factory=Ingested)
    run_ids: frozenset[str] = frozenset()
    assumed: frozenset[str] = frozenset()


def with_formats(files: Sequence[Path], name: str | None = None) -> list[tuple[Path, Format]]:
    """Each dump with the format that reads it: the one named, or the one that recognizes it.

    Raises:
        FormatError: a file is missing, or its format is not clear.
    """
    for path in files:
        check_file(path)
    return [(path, formats.named(name) if name else formats.format_of(path)) for path in files]


def check_dumps(dumps: Sequence[tuple[Path, Format]]) -> None:
    """Begins to read every dump. Nothing is written yet, so a mistyped path costs nothing.

    Raises:
        FormatError: a file is missing, of another kind, or lacks what its format requires.
    """
    for path, kind in dumps:
        check_file(path)
        next(kind.read(path), None)


def import_rollouts(
    lake: Lake,
    files: Sequence[tuple[Path, Format]],
    tokenizer: Any,
    progress: Callable[[int], None] | None = None,
) -> Imported:
    """Reads dumps into the lake, steps split on the way; a row that cannot enter goes to quarantine.

    Importing the same files again changes nothing. Groups may lie scattered over the files; each is
    committed whole.

    Args:
        files: each with the format that reads it.
        tokenizer: the one that the dumps' token ids are of.
        progress: called with the number of rows read so far.

    Raises:
        FormatError: a file is missing, cut off, of another kind, or lacks what its format requires; then
            nothing of this import is in the lake.
        LakeError: the lake cannot be written; then whole groups may be, and the import can be run again.
    """
    paths = [path for path, _ in files]
    for path in paths:
        check_file(path)
    run_id = "import-" + content_id(sorted(file_sha256(path) for path in paths))[:16]
    context = ImportContext(tokenizer, run_id)
    done = Imported()
    with ImportStaging(lake.folder, bytes_in_memory(paths)) as staging:
        num_rows = 0
        for number, (path, kind) in enumerate(files):
            for batch in batches(kind, path, number, num_rows, context):
                staging.add(batch)
                done = replace(done, assumed=done.assumed | batch.assumed)
                num_rows += batch.num_rows
                if progress is not None:
                    progress(num_rows)
        staging.finish()
        for refused in staging.refused():
            kept = _quarantine(lake, refused)
            done = replace(done, rows=done.rows + Ingested(0, 0, kept.num_rows, first_refusal(kept)))
        for part in staging.parts():
            with lake.alone():  # what is true of the lake at the checks must be true at the commit
                rows, run_ids = _committed(lake, part)
            done = replace(done, rows=done.rows + rows, run_ids=done.run_ids | run_ids)
    return done


def num_unscored(lake: Lake, run_ids: Sequence[str]) -> int:
    """How many rollouts of some runs await the scorer."""
    with lake.reader() as reader:
        return int(
            reader.rows(
                "select count(*) as n from rollouts "
                "where completion_entropies is null and list_contains($run_ids, run_id)",
                {"run_ids": list(run_ids)},
            )[0]["n"]
        )


def _quarantine(lake: Lake, refused: pa.Table) -> pa.Table:
    """Adds rows to `quarantine`, and returns them as they stand there."""

    def change(writer: Writer) -> pa.Table:
        cleaned = Forgotten.in_turn(writer).cleaned(refused)
        writer.append({"quarantine": cleaned})
        return cleaned

    return lake.changed(change)


def _committed(lake: Lake, part: pa.Table) -> tuple[Ingested, frozenset[str]]:
    """Gives whole groups their places and commits them, but for rows of forgotten prompts."""
    with lake.reader() as reader:
        part = _placed(reader, part)
        rows = named(part.select(schema.ROLLOUTS.names))
        reasons = conflicts(reader, rows)

    def origin_of(row: int) -> tuple[str, dict[str, Any]]:
        return part["source"][row].as_py(), rows.slice(row, 1).to_pylist()[0]

    done = ingest_table(lake, _dated(rows), reasons, origin_of, _prompts(part))
    return done, frozenset(pc.unique(rows["run_id"]).to_pylist())


def _placed(reader: Reader, part: pa.Table) -> pa.Table:
    """The rows that were not refused, group after group, each with its place."""
    reader.materialize_rows("staged_rollouts", part.select([*_GIVEN, *_CONTENT]))
    for stage in ("staged_samples", "held_rollouts", "sample_places"):
        reader.materialize(stage, sql_file(f"staging/{stage}"), {})
    places = reader.table(sql_file("staging/group_places"))
    numbers = part["nth"].to_numpy()
    order = np.argsort(numbers)
    part = part.take(order[np.searchsorted(numbers[order], places["nth"].to_numpy())]).combine_chunks()
    for name in ("sample_index", "group_size", "policy_version"):
        part = part.set_column(part.column_names.index(name), name, places[name])
    return part


def _dated(rows: pa.Table) -> pa.Table:
    """Rows that do not say when they were made are of now."""
    now = datetime.now(UTC)
    for name, value in (("night", now.date()), ("created_at", now)):
        filled = pc.coalesce(rows[name], pa.scalar(value, schema.ROLLOUTS.field(name).type))
        rows = rows.set_column(rows.column_names.index(name), schema.ROLLOUTS.field(name), filled)
    return rows.cast(schema.ROLLOUTS)


def _prompts(part: pa.Table) -> pa.Table | None:
    """The prompts of some rows, as the table `prompts`; None if all are known by their tokens only."""
    spoken = part.filter(part["messages"].is_valid())
    if not spoken.num_rows:
        return None
    ids = spoken["prompt_id"].to_pylist()
    first = {name: place for place, name in reversed(list(enumerate(ids)))}
    chosen = spoken.take(sorted(first.values()))
    count = len(first)
    given = {name: chosen[name] for name in ("prompt_id", "data_source", "messages", "ground_truth")}
    made = {"extra_info": ["{}"] * count, "created_at": [datetime.now(UTC)] * count}
    return pa.table(given | made).select(schema.PROMPTS.names).cast(schema.PROMPTS)
