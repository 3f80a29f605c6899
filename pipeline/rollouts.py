"""Rows of the table `rollouts`: made from sampled groups, checked, and given their steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import schema
from pipeline.config import SamplingConfig
from pipeline.flat_lists import Lists
from pipeline.hashing import rollout_id
from pipeline.precision import FLOAT32_BITS, rounded
from pipeline.quarantine import Refused
from pipeline.records import Group, Judgement, Policy, Prompt, Run, group_id
from pipeline.steps import SPLITTER, StepSpanError, mean_step_entropies
from pipeline.tokenization import completion_text, sampled_step_ends

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampled:
    """What the rollouts of one commit have in common."""

    run: Run
    policy: Policy
    sampling: SamplingConfig
    logprobs_kind: str
    entropy_kind: str | None
    verifier: str
    verifier_version: str
    entropy_bits: int = FLOAT32_BITS
    logprob_bits: int = FLOAT32_BITS


def rollout_rows(
    sampled: Sampled, groups: Sequence[Group], judgements: Sequence[Sequence[Judgement]], tokenizer: Any
) -> tuple[list[dict[str, Any]], list[Refused]]:
    """The rows of finished groups. A sample whose verifier gave no reward is refused, alone.

    Args:
        judgements: one per sample, in the order of `groups` and their samples.
    """
    rows: list[dict[str, Any]] = []
    refused: list[Refused] = []
    now = datetime.now(UTC)
    for group, judged in zip(groups, judgements, strict=True):
        group_name = group_id(sampled.run.run_id, group.prompt.prompt_id, sampled.policy.policy_version)
        for sample, judgement in zip(group.samples, judged, strict=True):
            row = {
                "group_id": group_name,
                "prompt_id": group.prompt.prompt_id,
                "run_id": sampled.run.run_id,
                "night": sampled.run.night,
                "origin": sampled.run.origin,
                "model": sampled.policy.model,
                "weights_hash": sampled.policy.weights_hash,
                "tokenizer_hash": sampled.policy.tokenizer_hash,
                "policy_version": sampled.policy.policy_version,
                "sample_index": sample.sample_index,
                "group_size": len(group.samples),
                "seed": sample.seed,
                "temperature": sampled.sampling.temperature,
                "top_p": sampled.sampling.top_p,
                "top_k": sampled.sampling.top_k,
                "max_tokens": sampled.sampling.max_tokens,
                "prompt_ids": group.prompt_ids,
                "completion_ids": sample.completion_ids,
                "completion": completion_text(tokenizer, sample.completion_ids.tolist()),
                "completion_logprobs": _rounded(sample.logprobs, sampled.logprob_bits),
                "logprobs_kind": None if sample.logprobs is None else sampled.logprobs_kind,
                "completion_entropies": _rounded(sample.entropies, sampled.entropy_bits),
                "entropy_kind": None if sample.entropies is None else sampled.entropy_kind,
                "finish_reason": sample.finish_reason,
                "reward": judgement.reward,
                "reward_parts": list(judgement.parts.items()) or None,
                "verifier": sampled.verifier,
                "verifier_version": sampled.verifier_version,
                "step_ends": sampled_step_ends(tokenizer, sample.completion_ids),
                "splitter": SPLITTER,
                "created_at": now,
            }
            if judgement.reward is None:
                refused.append(Refused(f"the verifier {judgement.error}", sampled.run.run_id, row))
            else:
                rows.append(row)
    return rows, refused


def _rounded(nats: NDArray[np.float32] | None, mantissa_bits: int) -> NDArray[np.float32] | None:
    return None if nats is None else rounded(nats, mantissa_bits)


def checked(
    rows: Sequence[dict[str, Any]], sources: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Refused]]:
    """Splits rows into those that may enter the lake and those that may not, with the reason."""
    good: list[dict[str, Any]] = []
    refused: list[Refused] = []
    for row, source in zip(rows, sources, strict=True):
        reason = problem_of(row)
        if reason:
            refused.append(Refused(reason, source, row))
        else:
            good.append(row)
    return good, refused


def problem_of(row: dict[str, Any]) -> str | None:
    """Why a row may not enter the lake: its entropies, log-probs, reward or steps; None if it may."""
    num_tokens = len(row["completion_ids"])
    for name in ("completion_entropies", "completion_logprobs"):
        values = row.get(name)
        if values is None:
            continue
        if len(values) != num_tokens:
            return f"{name} has {len(values)} values for {num_tokens} completion tokens"
        array = np.asarray(values, dtype=np.float64)
        if not (np.abs(array) <= _FLOAT32_MAX).all():  # NaN fails too
            return f"{name} holds NaN or infinite values"
        if name == "completion_entropies" and (array < 0).any():
            return "completion_entropies holds negative values"
    reward = row.get("reward")
    if reward is None:
        return "the reward is missing"
    if isinstance(reward, bool) or not isinstance(reward, int | float | np.number):
        return f"the reward {reward!r} is no number"
    try:
        finite = math.isfinite(reward)
    except OverflowError:  # an integer beyond every float
        finite = False
    if not finite:
        return f"the reward is {reward!s:.40}"
    return _step_problem(num_tokens, row["step_ends"])


def _step_problem(num_tokens: int, step_ends: Any) -> str | None:
    lengths = np.diff(np.asarray(step_ends, dtype=np.int64), prepend=0)
    if lengths.sum() != num_tokens or (lengths < 1).any():
        return str(StepSpanError(num_tokens, list(step_ends)))
    return None


def rollout_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Checked rows as a table of the lake's schema, with names and step entropies filled in.

    Step entropies come from the entropies as stored (float32), so that anyone can compute them again.

    Raises:
        StepSpanError: step ends that do not cover their completion.
    """
    return named(unnamed_table(rows))


def unnamed_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """`rollout_table` of rows that may have no place in their group yet: rollout_id is null."""
    columns: dict[str, Any] = {field.name: [row.get(field.name) for row in rows] for field in schema.ROLLOUTS}
    columns["reward"] = [float(row["reward"]) for row in rows]  # Arrow refuses whole numbers beyond 2^53
    columns["step_entropies"] = [_step_entropies(row) for row in rows]
    return pa.table(
        {field.name: pa.array(columns[field.name], field.type) for field in schema.ROLLOUTS}, schema.ROLLOUTS
    )


def named(table: pa.Table) -> pa.Table:
    """The table with the name of each rollout, which its place and its tokens give it."""
    prompts, completions = Lists(table["prompt_ids"]), Lists(table["completion_ids"])
    places = zip(table["group_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    names = [
        rollout_id(group, index, prompts.row(row), completions.row(row))
        for row, (group, index) in enumerate(places)
    ]
    at = table.column_names.index("rollout_id")
    return table.set_column(at, "rollout_id", pa.array(names, pa.string()))


def _step_entropies(row: dict[str, Any]) -> Any:
    ends = np.asarray(row["step_ends"], dtype=np.int32)
    if _step_problem(len(row["completion_ids"]), ends):
        raise StepSpanError(len(row["completion_ids"]), ends.tolist())
    if row.get("completion_entropies") is None:
        return None
    entropies = np.asarray(row["completion_entropies"], dtype=np.float32)
    return mean_step_entropies(entropies, ends, np.zeros(len(ends), dtype=np.int64))


def prompt_table(prompts: Sequence[Prompt]) -> pa.Table:
    now = datetime.now(UTC)
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": prompt.prompt_id,
                "data_source": prompt.data_source,
                "messages": json.dumps([dict(message) for message in prompt.messages], ensure_ascii=False),
                "ground_truth": prompt.ground_truth,
                "extra_info": json.dumps(dict(prompt.extra_info), ensure_ascii=False, default=str),
                "created_at": now,
            }
            for prompt in prompts
        ],
        schema.PROMPTS,
    )


def stored_prompt(row: Mapping[str, Any]) -> Prompt:
    """A row of the table `prompts` as the prompt that it was made from."""
    return Prompt(
        tuple(json.loads(row["messages"])),
        row["ground_truth"],
        row["data_source"] or "",
        json.loads(row["extra_info"] or "{}"),
    )
