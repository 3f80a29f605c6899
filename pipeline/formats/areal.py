"""AReaL's trajectory dump: `{tail_version}/{task_id}.jsonl`, one sample a line, as decoded text.

A task is a group. Texts keep their special tokens, so the prompt is what the model read, as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.fields import is_count, said, text
from pipeline.formats.json_rows import first_line_id, first_row, json_lines, rollouts
from pipeline.formats.source_rows import SourceRow

NAME = "areal"
_ASSUMED = "AReaL does not say which completions were cut off: all were taken to be finished."


def recognizes(path: Path) -> bool:
    return {"task_id", "sample_idx", "head_version", "tail_version", "completion"} <= first_row(path).keys()


def read(path: Path) -> Iterator[SourceRow]:
    """Every sample of one file.

    Raises:
        FormatError: the file cannot be read.
    """
    file = first_line_id(path)

    def group(row: Mapping[str, Any]) -> str | None:
        task = row.get("task_id")
        if isinstance(task, bool) or not isinstance(task, int | str):
            return None
        return f"areal/{file}/{task}"

    yield from rollouts(json_lines(path), group, _values, _ASSUMED, _sample_id)


def _sample_id(row: Mapping[str, Any]) -> str | None:
    index = row.get("sample_idx")
    return str(index) if is_count(index) else None


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    if row.get("segments"):
        raise FormatError("several sampled turns: `segments` has other tokens between sampled ones")
    head = row.get("head_version")
    # before scaling and clipping, where the dump has both
    reward = row["original_reward"] if row.get("original_reward") is not None else row.get("reward")
    return said(
        {
            "prompt_text": text(row, "prompt"),
            "completion": text(row, "completion"),
            "reward": reward,
            # the oldest weights that any of its tokens came from; -1 stands for none
            "policy_version": head if is_count(head) else None,
        }
    )
