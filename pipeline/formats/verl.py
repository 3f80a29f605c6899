"""verl's rollout dump: `{rollout_data_dir}/{global_step}.jsonl`, of either trainer.

`input` and `output` are texts, decoded without special tokens: prompt and completion are tokenized as they
stand, so the end-of-sequence token and a chat template's marks are not among the tokens. `score` is the sum
of the token scores, shaping included if the reward function shapes. The v1 trainer names rows
`uid = {prompt}_{session}_{output}`; only the last output of a session takes part in the advantages. The v0
trainer names none, so rows of one file with the same `input` are a group: a prompt that was drawn twice in
one step makes one group of two. `policy_version` is the step, which verl counts from 1: one more than the
optimizer steps behind the sampling weights, for every row alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.formats.json_lines import NO_OBJECT, first_object, numbered_lines
from pipeline.formats.source_rows import SourceRow, check_file
from pipeline.hashing import content_id, file_sha256

NAME = "verl"
REQUIRED = ("input", "output", "score", "step")
_OWN = frozenset({*REQUIRED, "gts", "uid", "request_id"})
_BY_INPUT = "verl's v0 dump names no groups: rows of one file with the same `input` were taken as one."


def recognizes(path: Path) -> bool:
    """Whether the first row has the texts, the score and the step."""
    row = first_object(path)
    return row is not None and row.keys() >= set(REQUIRED)


def read(path: Path) -> Iterator[SourceRow]:
    """The rows of a file; see `source_rows.Format`."""
    check_file(path)
    # The same prompt and step occur in every training, so the file itself tells groups apart.
    file = file_sha256(path)
    rows = (_row(f"{path.name}:{number}", row, file) for number, row in numbered_lines(path))
    return _last_outputs(rows)


def _row(source: str, row: Any, file: str) -> SourceRow:
    if not isinstance(row, dict):
        return SourceRow(source, {"line": row}, NO_OBJECT)
    refused = partial(SourceRow, source)
    for name in REQUIRED:
        if name not in row:
            return refused(row, f"column `{name}` is missing")
    if not isinstance(row["input"], str) or not isinstance(row["output"], str):
        return refused(row, "`input` and `output` must be text")
    place: dict[str, Any] = {"group_id": content_id(NAME, file, row["step"], row["input"])}
    if "uid" in row:
        parts = str(row["uid"]).rsplit("_", 2)
        if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
            return refused(row, f"uid {row['uid']!r:.60} is not `prompt_session_output`")
        place = {"group_id": content_id(NAME, file, row["step"], parts[0]), "sample_index": int(parts[1])}
    values = place | {
        "policy_version": row["step"],
        "prompt_text": row["input"],
        "completion": row["output"],
        "reward": row["score"],
        "reward_parts": _numbers(row) or None,
        "ground_truth": _text(row.get("gts")),
    }
    return SourceRow(source, values, assumed=None if "uid" in row else _BY_INPUT)


def _last_outputs(rows: Iterable[SourceRow]) -> Iterator[SourceRow]:
    """The rows, those refused that another output of the same session follows; the dump is sorted by uid."""
    held: SourceRow | None = None
    for row in rows:
        if held is not None:
            yield _superseded(held) if _place(held) == _place(row) else held
        held = row
    if held is not None:
        yield held


def _place(row: SourceRow) -> tuple[Any, Any] | str:
    if row.problem is None and "sample_index" in row.values:
        return row.values["group_id"], row.values["sample_index"]
    return row.source


def _superseded(row: SourceRow) -> SourceRow:
    return replace(row, problem="an earlier output of its session; verl gives the advantage to the last")


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What the reward function said beside the score, as far as it is numbers (or true and false)."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in _OWN and isinstance(value, int | float) and abs(value) < 2**53
    }


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
