"""Rows for the scorer's tests, and what a lake holds of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from float64_reference import entropies, next_token_logprobs, sampled_tokens_logprobs
from transformers import PreTrainedModel

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.transformers import TransformersEngine
from pipeline.lake import Lake
from pipeline.models import load_model, model_folder
from pipeline.prompts import read_prompts
from pipeline.records import Group
from pipeline.scoring import Selection
from pipeline.tokenization import load_tokenizer

ALL = Selection(rescore=True)


def rows_of(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Rows to import, with the numbers of the engine that sampled them; all rewards are 1."""
    return [
        {
            "group_id": group.prompt.text,
            "sample_index": sample.sample_index,
            "prompt_ids": group.prompt_ids.tolist(),
            "completion_ids": sample.completion_ids.tolist(),
            "completion_logprobs": sample.logprobs.tolist(),
            "completion_entropies": sample.entropies.tolist(),
            "reward": 1.0,
        }
        for group in groups
        for sample in group.samples
    ]


def arith_rollouts() -> list[dict[str, Any]]:
    """Groups of one to four rollouts of the embedded model, by itself: some prompts are shared."""
    folder = model_folder("arith")
    engine = TransformersEngine(load_model(folder, "cpu", "float32"), load_tokenizer(folder))
    requests = [
        GroupRequest(prompt, tuple(range(1 + index % 4)))
        for index, prompt in enumerate(read_prompts("arith", 40))
    ]
    return unscored(rows_of(engine.generate(requests, SamplingConfig(max_tokens=64))))


def without(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    return [row | dict.fromkeys(columns) for row in rows]


def unscored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return without(rows, "completion_entropies", "completion_logprobs")


def select(lake: Lake, query: str, snapshot: int | None = None) -> list[dict[str, Any]]:
    with lake.reader(snapshot) as reader:
        return reader.rows(query)


def by_place(lake: Lake, snapshot: int | None = None) -> dict[tuple[str, int], dict[str, Any]]:
    rows = select(lake, "select * from rollouts", snapshot)
    return {(row["group_id"], row["sample_index"]): row for row in rows}


def differences(exact: PreTrainedModel, lake: Lake) -> tuple[np.ndarray, np.ndarray]:
    """How far log-probs and entropies of every token in a lake are from a model's in float64."""
    of_logprobs, of_entropies = [], []
    for row in by_place(lake).values():
        ids = np.array(row["completion_ids"], np.int32)
        log_p = next_token_logprobs(exact, np.array(row["prompt_ids"], np.int32), ids)
        of_logprobs.append(np.abs(row["completion_logprobs"] - sampled_tokens_logprobs(log_p, ids)))
        of_entropies.append(np.abs(row["completion_entropies"] - entropies(log_p)))
    return np.concatenate(of_logprobs), np.concatenate(of_entropies)
