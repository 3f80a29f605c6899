"""What the scorer writes into the lake, against the same model in float64, one sequence at a time."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from dispatched import ONEDNN, Dispatched
from scoring_helpers import arith_rollouts, differences
from transformers import PreTrainedModel

from pipeline import scoring
from pipeline.models import load_model, model_folder, policy_of
from pipeline.tokenization import load_tokenizer


def texts() -> list[dict[str, Any]]:
    """Pieces of Python's reference of mixed lengths, as if one to four had been sampled of a prompt."""
    tokenizer, random = load_tokenizer(model_folder("smollm2")), np.random.default_rng(0)
    ids, at = tokenizer.encode("".join(topics.values())[:30_000], add_special_tokens=False), 0

    def piece(length: int) -> list[int]:
        nonlocal at
        at += length
        return ids[at - length : at]

    rows: list[dict[str, Any]] = []
    while sum(len(row["completion_ids"]) for row in rows) < 2200:
        group_id, prompt = str(at), piece(random.integers(5, 60))
        rows += [
            {
                "group_id": group_id,
                "sample_index": index,
                "prompt_ids": prompt,
                "completion_ids": piece(int(random.lognormal(4, 0.8)) + 1),
                "completion_entropies": None,
                "reward": 1.0,
            }
            for index in range(random.integers(1, 5))
        ]
    return rows


def cached_tokens(model: PreTrainedModel) -> list[int]:
    """Grows with the tokens that each forward pass from here on finds in its cache."""
    cached: list[int] = []

    def note(_module: object, _args: object, given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        cached.append(0 if cache is None else cache.get_seq_length())

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    return cached


@pytest.mark.parametrize(
    ("dtype", "error", "limit"), [("float32", np.max, 1e-4), ("bfloat16", np.mean, 0.03)]
)
@pytest.mark.parametrize(
    ("name", "rows_of"),
    [
        pytest.param("arith", arith_rollouts, id="arith"),
        pytest.param("smollm2", texts, id="smollm2", marks=pytest.mark.slow),
    ],
)
def test_two_thousand_tokens_in_the_lake_are_as_in_float64(put, name, rows_of, dtype, error, limit):
    folder, rows = model_folder(name), rows_of()
    tokenizer, model = load_tokenizer(folder), load_model(folder, "cpu", dtype)
    lake, cached = put(rows, tokenizer), cached_tokens(model)
    with Dispatched() as dispatched:
        assert scoring.score(lake, model, policy_of(folder, name, tokenizer)).scored == len(rows)
    assert ONEDNN in dispatched.operations
    assert any(cached), "prompts that several share are read once"
    assert not all(cached), "and others with their completion"
    exact = load_model(folder, "cpu", "float32").double()
    of_logprobs, of_entropies = differences(exact, lake)
    assert len(of_entropies) >= 2000
    print(f"{name}, {dtype}: entropies {error(of_entropies):.1e}, log-probs {error(of_logprobs):.1e} nats")
    assert error(of_entropies) <= limit
    assert error(of_logprobs) <= limit
