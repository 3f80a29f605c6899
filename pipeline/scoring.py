"""The scorer: entropies for rollouts whose engine could not know them, by teacher forcing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from pipeline.lake import Lake
from pipeline.logprobs import check_head, completion_logprobs
from pipeline.rollouts import rollout_table

COMMIT_ROLLOUTS = 512  # scored rollouts in one transaction; what is committed stays scored
FORWARD_TOKENS = 16_384  # padded tokens in one forward pass


@dataclass(frozen=True)
class Scored:
    """Numbers of rollouts: scored now, and left waiting because the model cannot read them.

    Attributes:
        other_tokenizer: of another tokenizer than the model's.
        unreadable: longer than the model's context, or without a prompt.
    """

    scored: int
    other_tokenizer: int
    unreadable: int


def score(
    lake: Lake,
    model: PreTrainedModel,
    tokenizer_hash: str,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """Gives entropies (at temperature 1), and log-probs where absent, to the rollouts that await them.

    Each batch replaces its rows in one transaction, so a scoring that is stopped goes on where it was.

    Args:
        progress: called with the number of rollouts scored so far.

    Raises:
        ModelError: the model's logits are more than its output embedding gives.
        LakeError: the lake cannot be written; then what was committed before stays.
    """
    check_head(model)
    context = int(getattr(model.config, "max_position_embeddings", 0) or 0) or 2**31
    with lake.reader() as reader:
        waiting = reader.rows(
            """
            select rollout_id, coalesce(tokenizer_hash, '') <> $tokenizer_hash as other_tokenizer,
                len(prompt_ids) = 0 or len(prompt_ids) + len(completion_ids) > $context as unreadable
            from rollouts
            where completion_entropies is null
            -- like lengths together: less padding
            order by len(prompt_ids) + len(completion_ids), rollout_id
            """,
            {"tokenizer_hash": tokenizer_hash, "context": context},
        )
    other = sum(row["other_tokenizer"] for row in waiting)
    ours = [row for row in waiting if not row["other_tokenizer"]]
    ids = [row["rollout_id"] for row in ours if not row["unreadable"]]
    for start in range(0, len(ids), COMMIT_ROLLOUTS):
        batch = ids[start : start + COMMIT_ROLLOUTS]
        lake.replace_rollouts(rollout_table(_with_entropies(model, _rows(lake, batch))))
        if progress is not None:
            progress(start + len(batch))
    return Scored(len(ids), other, len(ours) - len(ids))


def _rows(lake: Lake, rollout_ids: Sequence[str]) -> list[dict[str, Any]]:
    """The rollouts as the table has them, short ones first."""
    with lake.reader() as reader:
        reader.materialize_rows("wanted", pa.table({"rollout_id": pa.array(rollout_ids, pa.string())}))
        return reader.rows(
            "select rollouts.* from rollouts where rollout_id in (select wanted.rollout_id from wanted) "
            "order by len(prompt_ids) + len(completion_ids), rollout_id"
        )


@torch.inference_mode()
def _with_entropies(model: PreTrainedModel, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for batch in _forward_passes(rows):
        pairs = [
            (np.asarray(row["prompt_ids"], np.int32), np.asarray(row["completion_ids"], np.int32))
            for row in batch
        ]
        stats = completion_logprobs(model, pairs)
        ends = np.cumsum(stats.lengths.cpu().numpy())[:-1]
        # a sum of float32 can end a hair below zero where the model is sure
        entropies = np.split(stats.entropies.clamp(min=0).float().cpu().numpy(), ends)
        logprobs = np.split(stats.logprobs.float().cpu().numpy(), ends)
        for row, row_entropies, row_logprobs in zip(batch, entropies, logprobs, strict=True):
            row |= {"completion_entropies": row_entropies, "entropy_kind": "rescored"}
            if row["completion_logprobs"] is None:
                row |= {"completion_logprobs": row_logprobs, "logprobs_kind": "raw"}
    return rows


def _forward_passes(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows of growing length, as many together as FORWARD_TOKENS hold when padded; one at least."""
    batch: list[dict[str, Any]] = []
    for row in rows:
        longest = len(row["prompt_ids"]) + len(row["completion_ids"])
        if batch and (len(batch) + 1) * longest > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
