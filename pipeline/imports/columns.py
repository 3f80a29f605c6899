"""Whole columns of a dump at a time: rows beyond doubt get their defaults and steps by the thousand.

Nothing is refused here. A row that might be wrong is left to `rows`, which knows the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema
from pipeline.errors import EchoMineError
from pipeline.flat_lists import Lists, Mask, list_array
from pipeline.hashing import content_id, ids_array
from pipeline.imports.context import ImportContext
from pipeline.imports.rows import (
    DEFAULTS,
    ENTROPY_KINDS,
    FINISH_REASONS,
    LEAST,
    NAMES,
    ORIGINS,
    prompt_columns,
)
from pipeline.imports.types import Columns
from pipeline.steps import SPLITTER, mean_step_entropies

_IDS, _NATS = pa.list_(pa.int32()), pa.list_(pa.float32())


def completed_columns(columns: Columns, context: ImportContext) -> tuple[pa.Table, Mask]:
    """The rows beyond doubt with the defaults filled in and their steps split.

    Returns:
        a table with the columns of `rollouts` and of `prompt_columns`, rollout_id null, group_size and times
        as they were given; and [R] which of the rows it holds, in their order.
    """
    num_rows = columns.table.num_rows
    sure = columns.sure & _beyond_doubt(columns.table, context)
    prompts = _prompts(columns, context, sure)
    table = _all_columns(columns.table)
    if not sure.all():
        table = table.filter(pa.array(sure))
    kept = [prompts[row] for row in np.flatnonzero(sure)] if num_rows else []
    return _filled(table, kept, context), sure


def _all_columns(table: pa.Table) -> pa.Table:
    return pa.table(
        {
            field.name: table[field.name].combine_chunks()
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in schema.ROLLOUTS
        }
    )


def _beyond_doubt(table: pa.Table, context: ImportContext) -> Mask:
    sure = np.ones(table.num_rows, dtype=bool)

    def demand(name: str, holds: Callable[[Any], Any], *, absent: bool) -> None:
        """Rows where the column is null pass if it may be `absent`, others if the condition holds."""
        nonlocal sure
        if name in table.column_names:
            column = table[name].combine_chunks()
            met = pc.fill_null(holds(column), absent)
            sure = sure & met.to_numpy(zero_copy_only=False)
        elif not absent:
            sure = np.zeros_like(sure)

    def one_of(*values: str) -> Callable[[Any], Any]:
        return lambda column: pc.if_else(
            pc.is_valid(column), pc.is_in(column, pa.array(values, pa.string())), None
        )

    demand("group_id", pc.is_valid, absent=False)
    for name in NAMES:
        demand(name, lambda column: pc.invert(pc.match_substring(column, "\0")), absent=name != "group_id")
    demand("sample_index", lambda column: pc.greater_equal(column, 0), absent=True)
    demand("reward", pc.is_finite, absent=False)
    demand("origin", one_of(*ORIGINS), absent=True)
    demand("finish_reason", one_of(*FINISH_REASONS), absent=True)
    demand("entropy_kind", one_of(*ENTROPY_KINDS), absent=True)
    demand("tokenizer_hash", one_of(context.tokenizer_hash), absent=True)
    for name, least in LEAST.items():
        demand(name, lambda column, least=least: pc.greater_equal(column, least), absent=True)  # type: ignore[misc]
    lists = {name: Lists(table[name]) for name in _LISTS if name in table.column_names}
    completions = lists.get("completion_ids")
    if completions is None:
        return np.zeros_like(sure)
    sure &= completions.valid
    for name, column in lists.items():
        sure[column.rows(_doubtful(name, column.flat, context.vocabulary_size))] = False
        if name in ("completion_entropies", "completion_logprobs"):
            sure &= ~column.valid | (column.lengths == completions.lengths)
    if "prompt_ids" in lists:
        sure &= ~lists["prompt_ids"].valid | (lists["prompt_ids"].lengths > 0)
    if "step_ends" in lists:
        sure &= ~lists["step_ends"].valid | _cover(lists["step_ends"], completions.lengths)
    return sure


_LISTS = ("prompt_ids", "completion_ids", "completion_entropies", "completion_logprobs", "step_ends")


def _doubtful(name: str, flat: NDArray[Any], vocabulary_size: int) -> Mask:
    if name in ("prompt_ids", "completion_ids"):
        return np.asarray((flat < 0) | (flat >= vocabulary_size))
    if name == "completion_entropies":
        return np.asarray(~np.isfinite(flat) | (flat < 0))
    if name == "completion_logprobs":
        return np.asarray(~np.isfinite(flat))
    return np.zeros(len(flat), dtype=bool)


def _cover(ends: Lists, lengths: NDArray[np.int64]) -> Mask:
    """[R] Whether step ends increase from above 0 to the completion's length."""
    previous = np.concatenate([[0], ends.flat[:-1]])
    starts = ends.offsets[:-1][ends.lengths > 0]
    previous[starts] = 0
    rising = np.ones(len(lengths), dtype=bool)
    rising[ends.rows(ends.flat <= previous)] = False
    last = np.zeros(len(lengths), dtype=np.int64)
    last[ends.lengths > 0] = ends.flat[ends.offsets[1:][ends.lengths > 0] - 1]
    return np.asarray(rising & (last == lengths))


def _prompts(columns: Columns, context: ImportContext, sure: Mask) -> list[dict[str, Any]]:
    """[R] What is known of each row's prompt; a row whose prompt is in doubt loses its place in `sure`."""
    given = columns.table.column_names
    ids = columns.table["prompt_ids"].combine_chunks() if "prompt_ids" in given else None
    lists = Lists(ids) if ids is not None else None
    prompts: list[dict[str, Any]] = [{} for _ in range(columns.table.num_rows)]
    for row in np.flatnonzero(sure).tolist():
        words = {name: values[row] for name, values in columns.words.items() if values[row] is not None}
        try:
            has_ids = lists is not None and bool(lists.valid[row])
            prompt = context.prompt(words, has_ids=has_ids)
            if lists is not None and has_ids:
                made, own = None, lists.row(row)
            else:
                made = context.prompt_ids(words, prompt)
                own = np.asarray(made)
        except EchoMineError:
            sure[row] = False
            continue
        if not len(own):
            sure[row] = False
            continue
        name = prompt.prompt_id if prompt is not None else content_id("tokens", ids_array(own))
        prompts[row] = {"prompt_id": name, "prompt_ids": made} | prompt_columns(prompt)
    return prompts


def _filled(table: pa.Table, prompts: list[dict[str, Any]], context: ImportContext) -> pa.Table:
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    num_rows = table.num_rows
    ids, entropies = Lists(columns["completion_ids"]), columns["completion_entropies"]
    facts = context.facts

    def default(name: str, value: Any) -> None:
        columns[name] = pc.coalesce(columns[name], value)

    for name, value in (*DEFAULTS.items(), ("run_id", context.run_id)):
        default(name, pa.scalar(value, columns[name].type))
    columns["tokenizer_hash"] = pa.array([context.tokenizer_hash] * num_rows, pa.string())
    default("prompt_id", pa.array([prompt["prompt_id"] for prompt in prompts], pa.string()))
    if columns["prompt_ids"].null_count:
        default("prompt_ids", pa.array([prompt["prompt_ids"] for prompt in prompts], _IDS))
    if columns["completion"].null_count:
        default("completion", facts.completions(ids.flat, ids.offsets))
    given = pc.is_valid(columns["step_ends"])
    columns["splitter"] = pc.coalesce(columns["splitter"], pc.if_else(given, "given", SPLITTER))
    if columns["step_ends"].null_count:
        ends, counts = facts.step_ends(ids.flat, ids.offsets)
        default("step_ends", list_array(ends, counts, _IDS))
    columns["step_entropies"] = _step_entropies(entropies, columns["step_ends"])
    for name, value, of in (
        ("entropy_kind", "full_vocab", entropies),
        ("logprobs_kind", "raw", columns["completion_logprobs"]),
    ):
        default(name, pc.if_else(pc.is_valid(of), value, pa.scalar(None, pa.string())))
    for name in prompt_columns(None):
        columns[name] = pa.array([prompt[name] for prompt in prompts], pa.string())
    return pa.table(columns)


def _step_entropies(entropies: pa.Array, step_ends: pa.Array) -> pa.Array:
    """The mean entropy of each step, null where the entropies are."""
    nats, ends = Lists(entropies), Lists(step_ends)
    owner = np.repeat(np.arange(len(nats.valid)), ends.lengths)
    scored = nats.valid[owner]
    means = mean_step_entropies(nats.flat, ends.flat[scored], nats.offsets[:-1][owner][scored])
    return list_array(means, np.where(nats.valid, ends.lengths, 0), _NATS, nats.valid)
