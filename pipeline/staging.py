"""Batches on their way into the lake: one Parquet file a batch, so that stages pass paths, not tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.parquet import write_data_file
from pipeline.records import Group, Judgement, Prompt, Sample

_IDS, _NATS = pa.list_(pa.int32()), pa.list_(pa.float32())

STAGED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_ids", _IDS),
        ("sample_index", pa.int32()),
        ("seed", pa.int64()),
        ("completion_ids", _IDS),
        ("logprobs", _NATS),
        ("entropies", _NATS),
        ("finish_reason", pa.string()),
        # filled in by verification
        ("judged", pa.bool_()),
        ("reward", pa.float64()),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("error", pa.string()),
    ]
)


def stage(
    path: Path, groups: Sequence[Group], judgements: Sequence[Sequence[Judgement]] | None = None
) -> Path:
    """Writes groups, and what was said of them if they were judged; complete or not at all."""
    rows: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        for k, sample in enumerate(group.samples):
            judgement = judgements[i][k] if judgements is not None else None
            rows.append(
                {
                    "prompt_id": group.prompt.prompt_id,
                    "prompt_ids": group.prompt_ids,
                    "sample_index": sample.sample_index,
                    "seed": sample.seed,
                    "completion_ids": sample.completion_ids,
                    "logprobs": sample.logprobs,
                    "entropies": sample.entropies,
                    "finish_reason": sample.finish_reason,
                    "judged": judgement is not None,
                    "reward": judgement.reward if judgement is not None else None,
                    "reward_parts": list(judgement.parts.items()) if judgement is not None else [],
                    "error": judgement.error if judgement is not None else "",
                }
            )
    write_data_file(pa.Table.from_pylist(rows, STAGED), path)
    return path


def staged(path: Path, prompts: Mapping[str, Prompt]) -> tuple[list[Group], list[list[Judgement]]]:
    """The groups of a staged file and their judgements (of no meaning unless it was judged).

    Args:
        prompts: by prompt_id.
    """
    groups: list[Group] = []
    judgements: list[list[Judgement]] = []
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(path).to_pylist():
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in by_prompt.items():
        samples = tuple(
            Sample(
                sample_index=row["sample_index"],
                seed=row["seed"],
                completion_ids=np.array(row["completion_ids"], dtype=np.int32),
                logprobs=_nats(row["logprobs"]),
                entropies=_nats(row["entropies"]),
                finish_reason=row["finish_reason"],
            )
            for row in rows
        )
        groups.append(Group(prompts[prompt_id], np.array(rows[0]["prompt_ids"], dtype=np.int32), samples))
        judgements.append([Judgement(row["reward"], dict(row["reward_parts"]), row["error"]) for row in rows])
    return groups, judgements


def staged_prompt_ids(path: Path) -> set[str]:
    """The prompts whose groups a staged file holds."""
    return set(pq.read_table(path, columns=["prompt_id"])["prompt_id"].to_pylist())


def is_judged(path: Path) -> bool:
    return bool(pq.read_table(path, columns=["judged"])["judged"][0].as_py())


def _nats(values: list[float] | None) -> np.ndarray | None:
    return None if values is None else np.array(values, dtype=np.float32)
