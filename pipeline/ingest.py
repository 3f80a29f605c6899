"""The one door into the lake: rows are checked, conflicts are refused, whole groups are committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.forgotten import Forgotten
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

    Rows with bad entropies, log-probs or rewards, samples whose (group_id, sample_index) is taken by another
    rollout, and samples of another prompt or policy than their group's, go to quarantine; the rest of the
    batch proceeds. Of rows of a forgotten prompt quarantine keeps the place only. One transaction.

    Args:
        sources: where each row comes from: a run, or a file and line.
        refused: rows that were refused before they got here.

    Raises:
        LakeError: the lake cannot be written; then nothing of this call is in it.
    """
    forgotten = Forgotten.of(lake)
    if forgotten.fingerprints:  # their text must not come back, not even into quarantine
        rows, sources, refused = forgotten.kept_out(rows, sources, refused)
        prompts = forgotten.without(prompts)
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


@dataclass
class _Held:
    """What the lake and the rows so far hold of some groups.

    Attributes:
        places: rollout and reward by (group, sample index).
        policies: (prompt, model, policy version) by group; experts aside.
    """

    places: dict[tuple[str, int], tuple[str, float]] = field(default_factory=dict)
    policies: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)

    def conflict(self, row: dict[str, Any]) -> str | None:
        """Why the row contradicts what is held, or None; then it is held too."""
        group, index = row["group_id"], int(row["sample_index"])
        if row.get("origin") != "expert":
            policy = (row.get("prompt_id"), row.get("model"), row.get("policy_version"))
            known = self.policies.setdefault(group, policy)
            if known != policy:
                return f"group {group} is of one prompt, model and policy version: {known}, not {policy}"
        content = (
            rollout_id(group, index, row["prompt_ids"], row["completion_ids"]),
            float(row["reward"]),
        )
        if self.places.setdefault((group, index), content) != content:
            return f"duplicate: sample {index} of group {group} is there with another content"
        return None


def _without_conflicts(
    lake: Lake, rows: list[dict[str, Any]], source_of: dict[int, str]
) -> tuple[list[dict[str, Any]], list[Refused]]:
    """Refuses rows that contradict their group: another prompt or policy, or a place that is taken."""
    held = _held(lake, rows)
    good, refused = [], []
    for row in rows:
        reason = held.conflict(row)
        if reason is None:
            good.append(row)
        else:
            refused.append(Refused(reason, source_of[id(row)], row))
    return good, refused


def _held(lake: Lake, rows: Sequence[dict[str, Any]]) -> _Held:
    groups = pa.table({"group_id": pa.array(sorted({row["group_id"] for row in rows}), pa.string())})
    held = _Held()
    with lake.reader() as reader:
        reader.materialize_rows("incoming_groups", groups)
        for row in reader.rows(
            "select group_id, sample_index, rollout_id, reward, origin, prompt_id, model, policy_version "
            "from rollouts where group_id in (select incoming_groups.group_id from incoming_groups)"
        ):
            held.places[row["group_id"], row["sample_index"]] = row["rollout_id"], row["reward"]
            if row["origin"] != "expert":
                held.policies[row["group_id"]] = row["prompt_id"], row["model"], row["policy_version"]
    return held
