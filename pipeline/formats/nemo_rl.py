"""NeMo-RL's `train_data_step{N}.jsonl`: one sample of the training batch a line.

The writer logs a batch of one as a line, so that every value but `idx` is a list of one. Token arrays are
padded to the longest sample of the step; `input_lengths` tells where they end. There is no group: samples
of one step with the same prompt are one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.fields import is_count, mask, one_run, said, short, token_ids
from pipeline.formats.json_rows import first_line_id, first_row, json_lines, rollouts
from pipeline.formats.source_rows import SourceRow
from pipeline.hashing import content_id, ids_array

NAME = "nemo-rl"
_ASSUMED = "NeMo-RL names no groups: rows of one file with the same prompt were taken as one."
_PER_TOKEN = ("token_ids", "token_loss_mask", "generation_logprobs")
_STEP = re.compile(r"train_data_step(\d{1,9})\.jsonl$")


def recognizes(path: Path) -> bool:
    return {"rewards", "input_lengths", "idx"} <= first_row(path).keys()


def read(path: Path) -> Iterator[SourceRow]:
    """Every sample of one step.

    Raises:
        FormatError: the file cannot be read.
    """
    found = _STEP.search(path.name)
    step = int(found.group(1)) if found else None
    file = first_line_id(path)

    def group(row: Mapping[str, Any]) -> str:
        ids, flags = _tokens(row)
        prompt_ids = ids_array(ids[: flags.index(True)] if True in flags else ids)
        return f"nemo-rl/{file}/{content_id(prompt_ids)[:16]}"

    def values(row: Mapping[str, Any]) -> dict[str, Any]:
        return _values(row) | said({"policy_version": step})

    yield from rollouts(json_lines(path), group, values, _ASSUMED)


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    ids, flags = _tokens(row)
    start, end = one_run(flags, "token_loss_mask")
    logprobs = _only(row, "generation_logprobs")
    # With dynamic sampling `rewards` are those of the batch before groups were filtered: of other samples.
    reward = _only(row, "filtered_rewards" if "filtered_rewards" in row else "rewards")
    return said(
        {
            "prompt_ids": ids[:start],
            "completion_ids": ids[start:end],
            "completion_logprobs": logprobs[start:end] if isinstance(logprobs, list) else None,
            "reward": reward,
            # Left out of the loss: cut off, or its prompt was too long. No clip may come of it.
            "finish_reason": "length" if _only(row, "sample_loss_mask") == 0 else None,
        }
    )


def _tokens(row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """The sample's ids without padding, and for each whether it was sampled."""
    if "token_ids" not in row:
        raise FormatError("the row has no `token_ids`: this version of NeMo-RL did not write them")
    ids = token_ids(_only(row, "token_ids"), "token_ids")
    length = _only(row, "input_lengths")
    if not is_count(length) or length > len(ids):
        raise FormatError(f"`input_lengths` is {short(length)} for {len(ids)} tokens")
    flags = mask(_only(row, "token_loss_mask"), "token_loss_mask", len(ids))
    return ids[:length], flags[:length]


def _only(row: Mapping[str, Any], name: str) -> Any:
    """The value of a batch of one, whether it comes in its list or alone."""
    value = row.get(name)
    if isinstance(value, list) and len(value) == 1 and (isinstance(value[0], list) or name not in _PER_TOKEN):
        return value[0]
    return value
