"""The one door into the lake: rows are checked, conflicts are refused, whole groups are committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.forgotten import FORGOTTEN, Forgotten, emptied
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.lake_writer import Writer
from pipeline.quarantine import Refused, first_refusal, quarantine_table
from pipeline.records import Prompt
from pipeline.rollouts import checked, prompt_table, rollout_table
from pipeline.sqlfiles import sql_file

_POLICY = ("prompt_id", "model", "policy_version")
_CLAIM = ("rollout_id", "group_id", "sample_index", "reward", "origin", *_POLICY)


@dataclass(frozen=True)
class Ingested:
    """Numbers of rows: new in the lake, there before, and refused into quarantine.

    Attributes:
        refusal: where the first refused row stood, and why it was refused; None if none was.
    """

    written: int = 0
    known: int = 0
    refused: int = 0
    refusal: str | None = field(default=None, compare=False)

    def __add__(self, other: Ingested) -> Ingested:
        numbers = (self.written + other.written, self.known + other.known, self.refused + other.refused)
        return Ingested(*numbers, self.refusal or other.refusal)

    def counts(self) -> dict[str, int]:
        """The numbers by name."""
        return {"written": self.written, "known": self.known, "refused": self.refused}


def ingest(
    lake: Lake,
    rows: Sequence[dict[str, Any]],
    sources: Sequence[str],
    prompts: Sequence[Prompt] = (),
    refused: Sequence[Refused] = (),
) -> Ingested:
    """Commits rows of `rollouts` (without names and step entropies), their prompts, and what was refused.

    Rows with bad entropies, log-probs or rewards, samples whose (group_id, sample_index) is taken by another
    rollout, and samples of another prompt or policy than their group's, go to quarantine; the rest of the
    batch proceeds. Of rows of a forgotten prompt quarantine keeps the place only. One transaction.

    Args:
        sources: where each row comes from: a run, or a file and line.
        refused: rows that were refused before they got here.

    Raises:
        LakeError: the lake cannot be written; then nothing of this call is in it.
    """
    good, bad = checked(rows, sources)
    source_of = {id(row): source for row, source in zip(rows, sources, strict=True)}
    prompts_table = prompt_table(prompts) if prompts else None
    table = rollout_table(good)
    with lake.alone():  # what is true of the lake at the checks must be true at the commit
        with lake.reader() as reader:
            reasons = conflicts(reader, table)
        return ingest_table(
            lake,
            table,
            reasons,
            lambda row: (source_of[id(good[row])], good[row]),
            prompts_table,
            [*refused, *bad],
        )


def ingest_table(
    lake: Lake,
    rows: pa.Table,
    reasons: Mapping[int, str],
    origin_of: Callable[[int], tuple[str, Mapping[str, Any]]],
    prompts: pa.Table | None = None,
    refused: Sequence[Refused] = (),
) -> Ingested:
    """`ingest` of rows that are checked, named and compared with the lake, all while it is `alone`.

    Args:
        rows: of the schema of `rollouts`.
        reasons: why some may not enter, by their number: their `conflicts`.
        origin_of: the source of a row, by its number, and what of it goes to quarantine.
        prompts: of the schema of `prompts`.

    Raises:
        LakeError: the lake cannot be written; then nothing of this call is in it.
    """

    def change(writer: Writer) -> Ingested:
        forgotten = Forgotten.in_turn(writer)  # their text must not come back, not even into quarantine
        gone = forgotten.rows(rows, prompts)
        bad = list(refused)
        out = sorted(gone | reasons.keys())
        for number in out:
            source, row = origin_of(number)
            item = Refused(reasons.get(number, FORGOTTEN), source, dict(row))
            bad.append(emptied(item) if number in gone else item)
        good = rows
        if out:
            good = rows.take(np.setdiff1d(np.arange(rows.num_rows), out))
        tables = {"rollouts": good}
        if prompts is not None:
            left_out = frozenset(rows["prompt_id"].take(pa.array(sorted(gone), pa.int64())).to_pylist())
            tables["prompts"] = forgotten.prompts(prompts, left_out)
        refusal = None
        if bad:
            tables["quarantine"] = quarantine_table(forgotten.emptied(bad))
            refusal = first_refusal(tables["quarantine"])
        new = writer.append(tables)
        return Ingested(new["rollouts"], good.num_rows - new["rollouts"], len(bad), refusal)

    return lake.changed(change)


def conflicts(reader: Reader, rows: pa.Table) -> dict[int, str]:
    """Why rows contradict their group, by their number: another prompt or policy, or a taken place."""
    numbers = pa.array(np.arange(rows.num_rows))
    reader.materialize_rows("incoming_rollouts", rows.select(_CLAIM).append_column("nth", numbers))
    found = reader.rows(sql_file("staging/conflicts"))
    return {conflict["nth"]: _reason(rows, conflict) for conflict in found}


def _reason(rows: pa.Table, conflict: Mapping[str, Any]) -> str:
    row = rows.select(_CLAIM).slice(conflict["nth"], 1).to_pylist()[0]
    group = row["group_id"]
    if conflict["conflict"] == "content":
        return f"duplicate: sample {row['sample_index']} of group {group} is there with another content"
    known, given = (tuple(place[name] for name in _POLICY) for place in (conflict, row))
    return f"group {group} is of one prompt, model and policy version: {known}, not {given}"
