"""What verifiers writes by itself: `traces.jsonl` since 0.4, `results.jsonl` (RolloutOutput) before.

A RolloutOutput has tokens only if the columns `trajectory` were asked for, and no entropies at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.fields import (
    began,
    items,
    known_messages,
    member,
    messages,
    numbers,
    per_token,
    said,
    sampled_run,
    sampled_text,
    token_ids,
    truth,
)
from pipeline.formats.json_rows import first_line_id, first_row, json_lines, rollouts
from pipeline.formats.source_rows import SourceRow
from pipeline.formats.traces import is_episode, is_trace, trace_group, trace_id, trace_values, traces

NAME = "verifiers"


def recognizes(path: Path) -> bool:
    row = first_row(path)
    if is_episode(row):
        return member(row, "run").get("type") != "train"
    return is_trace(row) or _is_output(row)


def read(path: Path) -> Iterator[SourceRow]:
    """Every rollout of one file, of either kind.

    Raises:
        FormatError: the file cannot be read.
    """
    file = f"verifiers/{first_line_id(path)}"
    if _is_output(first_row(path)):
        yield from rollouts(json_lines(path), partial(_group, file), _values)
    else:
        group = partial(trace_group, file)
        yield from rollouts(traces(json_lines(path)), group, trace_values, sample_id=trace_id)


def _is_output(row: Mapping[str, Any]) -> bool:
    return {"example_id", "prompt", "completion", "reward", "is_completed"} <= row.keys()


def _group(file: str, row: Mapping[str, Any]) -> str | None:
    example, task = row.get("example_id"), row.get("task")
    if isinstance(example, bool) or not isinstance(example, int | str):
        return None
    return f"{file}/{task}/{example}" if isinstance(task, str) and task else f"{file}/{example}"


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    if row.get("error"):
        kind = member(row, "error").get("error", row["error"])
        raise FormatError(f"the rollout failed: {kind!s:.120}")
    if row.get("is_completed") is False:
        raise FormatError("the rollout did not complete, so its reward says nothing")
    task = row.get("task")
    return said(
        (_tokens(row) if row.get("trajectory") else _text(row))
        | {
            "reward": row.get("reward"),
            "reward_parts": numbers(member(row, "metrics")) or None,
            "finish_reason": "length" if row.get("is_truncated") else "stop",
            "ground_truth": truth(row.get("answer")),
            "data_source": task if isinstance(task, str) and task else None,
            **began(member(row, "timing").get("start_time")),
        }
    )


def _tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = items(row, "trajectory")
    if len(turns) != 1 or not isinstance(turns[0], dict):
        raise FormatError(f"several sampled turns: its trajectory has {len(turns)}")
    tokens = member(turns[0], "tokens")
    if not tokens:
        return _text(row)
    ids = token_ids(tokens.get("completion_ids"), "completion_ids")
    if not ids:
        raise FormatError(
            "nothing was sampled: the prompt left no room"
            if tokens.get("overlong_prompt")
            else "nothing was sampled: completion_ids is empty"
        )
    start, end = sampled_run(tokens.get("completion_mask"), "completion_mask", len(ids))
    if start:
        raise FormatError("several sampled turns: the completion starts with tokens that were not sampled")
    logprobs = per_token(tokens.get("completion_logprobs"), "completion_logprobs", len(ids))
    return {
        "messages": known_messages(row.get("prompt"), "prompt"),
        "prompt_ids": token_ids(tokens.get("prompt_ids"), "prompt_ids"),
        "completion_ids": ids[:end],
        "completion_logprobs": None if logprobs is None else logprobs[:end],
    }


def _text(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    asked: dict[str, Any] = (
        {"prompt_text": prompt} if isinstance(prompt, str) else {"messages": messages(prompt, "prompt")}
    )
    if isinstance(completion, str):
        return asked | {"completion": completion}
    turns = items(row, "completion")
    if len(turns) != 1 or not isinstance(turns[0], dict) or turns[0].get("role") != "assistant":
        raise FormatError(f"several sampled turns: its completion has {len(turns)} messages")
    return asked | {"completion": sampled_text(turns[0])}
