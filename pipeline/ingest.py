"""The one door into the lake: rows are checked, conflicts are refused, whole groups are committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.hashing import rollout_id
from pipeline.lake import Lake
from pipeline.records import Prompt
from pipeline.rollouts import Refused, checked, prompt_table, quarantine_table, rollout_table


@dataclass(frozen=True)
class Ingested:
    """Numbers of rows: new in the lake, there before, and refused into quarantine."""

    written: int = 0
    known: int = 0
    refused: int = 0

    def __add__(self, other: Ingested) -> Ingested:
        return Ingested(self.written + other.written, self.known + other.known, self.refused + other.refused)


def ingest(
    lake: Lake,
    rows: Sequence[dict[str, Any]],
    sources: Sequence[str],
    prompts: Sequence[Prompt] = (),
    refused: Sequence[Refused] = (),
) -> Ingested:
    """Commits rows of `rollouts` (without names and step entropies), their prompts, and what was refused.

    Rows with bad entropies, log-probs or rewards, and samples whose (group_id, sample_index) is taken by
    another rollout, go to quarantine; the rest of the batch proceeds. One transaction.

    Args:
        sources: where each row comes from: a run, or a file and line.
        refused: rows that were refused before they got here.

    Raises:
        LakeError: the lake cannot be written; then nothing of this call is in it.
    """
    good, bad = checked(rows, sources)
    source_of = {id(row): source for row, source in zip(rows, sources, strict=True)}
    good, conflicting = _without_conflicts(lake, good, source_of)
    all_refused = [*refused, *bad, *conflicting]
    tables: dict[str, pa.Table] = {"rollouts": rollout_table(good)}
    if prompts:
        tables["prompts"] = prompt_table(prompts)
    if all_refused:
        tables["quarantine"] = quarantine_table(all_refused)
    new = lake.commit(tables)
    return Ingested(new["rollouts"], len(good) - new["rollouts"], len(all_refused))


def _without_conflicts(
    lake: Lake, rows: list[dict[str, Any]], source_of: dict[int, str]
) -> tuple[list[dict[str, Any]], list[Refused]]:
    """Refuses rows whose place in the group is taken by a rollout with other tokens or another reward."""
    taken = _places_in_lake(lake, rows)
    good, refused = [], []
    for row in rows:
        place = (row["group_id"], int(row["sample_index"]))
        content = rollout_id(*place, row["prompt_ids"], row["completion_ids"]), float(row["reward"])
        if taken.setdefault(place, content) == content:
            good.append(row)
        else:
            reason = f"duplicate: sample {place[1]} of group {place[0]} is there with another content"
            refused.append(Refused(reason, source_of[id(row)], row))
    return good, refused


def _places_in_lake(lake: Lake, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], tuple[str, float]]:
    groups = pa.table({"group_id": pa.array(sorted({row["group_id"] for row in rows}), pa.string())})
    with lake.reader() as reader:
        reader.materialize_rows("incoming_groups", groups)
        held = reader.rows(
            "select group_id, sample_index, rollout_id, reward from rollouts "
            "where group_id in (select incoming_groups.group_id from incoming_groups)"
        )
    return {(row["group_id"], row["sample_index"]): (row["rollout_id"], row["reward"]) for row in held}
