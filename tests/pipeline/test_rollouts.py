"""What may enter the lake, and what is kept of the rest."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import numpy as np
import pytest
from lake_worker import rollout
from sample_lake import EOS_ID, character_tokenizer

from pipeline.config import SamplingConfig
from pipeline.quarantine import Refused, quarantine_table
from pipeline.records import Group, Judgement, Policy, Prompt, Run, Sample
from pipeline.rollouts import Sampled, checked, rollout_rows, rollout_table
from pipeline.steps import StepSpanError

NAN, INF = float("nan"), float("inf")

REFUSED = [
    ({"completion_entropies": [0.5]}, "completion_entropies has 1 values for 2 completion tokens"),
    ({"completion_logprobs": [0.5] * 3}, "completion_logprobs has 3 values for 2 completion tokens"),
    ({"completion_entropies": [0.5, -0.1]}, "completion_entropies holds negative values"),
    ({"completion_entropies": [0.5, NAN]}, "completion_entropies holds NaN or infinite values"),
    ({"completion_entropies": [INF, 0.5]}, "completion_entropies holds NaN or infinite values"),
    ({"completion_entropies": [1e39, 0.5]}, "completion_entropies holds NaN or infinite values"),
    ({"completion_logprobs": [-INF, -1.0]}, "completion_logprobs holds NaN or infinite values"),
    ({"reward": None}, "the reward is missing"),
    ({"reward": NAN}, "the reward is nan"),
    ({"reward": -INF}, "the reward is -inf"),
    ({"reward": 10**400}, "the reward is 1000"),
    ({"reward": "1.0"}, "the reward '1.0' is no number"),
    ({"reward": True}, "the reward True is no number"),
    ({"step_ends": [1]}, "do not cover a completion of 2 tokens"),
    ({"step_ends": [2, 2]}, "do not cover a completion of 2 tokens"),
    ({"step_ends": []}, "do not cover a completion of 2 tokens"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_a_bad_row_is_refused_with_its_reason_and_the_others_pass(
    changes: dict[str, Any], reason: str
) -> None:
    rows = [rollout("a", 0), rollout("a", 1) | changes, rollout("a", 2)]
    good, refused = checked(rows, ["one", "two", "three"])
    assert good == [rows[0], rows[2]]
    assert [item.source for item in refused] == ["two"]
    assert reason in refused[0].reason
    (kept,) = quarantine_table(refused).to_pylist()
    assert (kept["group_id"], kept["sample_index"], kept["source"]) == ("a", 1, "two")
    assert json.loads(kept["row"], parse_constant=pytest.fail)["completion_ids"] == rows[1]["completion_ids"]


def test_missing_entropies_and_an_empty_completion_are_no_mistakes() -> None:
    waiting = rollout("a", 0) | {"completion_entropies": None, "entropy_kind": None}
    empty = rollout("a", 1) | {"completion_ids": [], "completion_entropies": [], "step_ends": []}
    assert checked([waiting, empty], ["", ""]) == ([waiting, empty], [])
    table = rollout_table([waiting, empty]).to_pylist()
    assert table[0]["step_entropies"] is None
    assert table[1]["step_entropies"] == []


def test_step_entropies_come_from_the_entropies_as_they_are_stored() -> None:
    entropies = [0.1, 0.2, 0.30000001, 1e-9, 5.5]
    row = rollout("a", 0, num_tokens=5) | {"completion_entropies": entropies, "step_ends": [3, 5]}
    (stored,) = rollout_table([row]).to_pylist()
    kept = np.float32(stored["completion_entropies"]).astype(np.float64)
    assert stored["completion_entropies"] != entropies
    expected = np.float32([kept[:3].mean(), kept[3:].mean()])
    assert np.array_equal(np.float32(stored["step_entropies"]), expected)


def test_a_table_is_not_made_of_steps_that_do_not_cover_the_completion() -> None:
    with pytest.raises(StepSpanError, match="Leave `step_ends` out"):
        rollout_table([rollout("a", 0) | {"step_ends": [3]}])


def test_a_rollout_is_named_by_its_place_and_its_tokens_alone() -> None:
    row = rollout("a", 0)
    others = [
        row | {"reward": 0.0, "model": "other"},
        row | {"group_id": "b"},
        row | {"sample_index": 1},
        row | {"prompt_ids": [1]},
        row | {"completion_ids": [7, 9]},
    ]
    first, same, *different = rollout_table([row, *others])["rollout_id"].to_pylist()
    assert first == same
    assert len({first, *different}) == 5


def test_what_unicode_cannot_hold_is_quarantined_as_its_escape() -> None:
    (row,) = quarantine_table(
        [Refused("why", "file:1", {"group_id": "\ud800", "sample_index": 2**40, "x": {1: (NAN, b"z")}})]
    ).to_pylist()
    assert row["group_id"] == "\\ud800"
    assert row["sample_index"] is None
    assert json.loads(row["row"])["x"] == {"1": ["nan", "b'z'"]}


def sampled_group() -> tuple[Sampled, Group]:
    tokenizer = character_tokenizer()
    ids = np.array([*tokenizer("4\n#2")["input_ids"], EOS_ID], dtype=np.int32)
    nats = np.linspace(0, 1, len(ids), dtype=np.float32)
    samples = tuple(Sample(index, 90 + index, ids, -nats, nats, "stop") for index in range(3))
    group = Group(Prompt(({"role": "user", "content": "2+2?"},)), np.array([1, 2], dtype=np.int32), samples)
    policy = Policy("small", "weights", "tokens", 8)
    run = Run("run", date(2026, 3, 1))
    return Sampled(run, policy, SamplingConfig(group_size=3), "raw", "full_vocab", "exact", "1"), group


def test_a_rollout_that_the_verifier_lost_is_refused_alone_and_still_counts_in_its_group() -> None:
    sampled, group = sampled_group()
    judged = [Judgement(1.0, {"format": 0.5}), Judgement(None, error="took longer than 10 s"), Judgement(0.0)]
    rows, refused = rollout_rows(sampled, [group], [judged], character_tokenizer())
    assert [(row["sample_index"], row["group_size"]) for row in rows] == [(0, 3), (2, 3)]
    assert [(item.reason, item.source) for item in refused] == [("the verifier took longer than 10 s", "run")]
    first, second = rollout_table(rows).to_pylist()
    assert first["completion"] == "4\n#2"
    assert first["step_ends"] == [2, 5]
    assert first["reward_parts"] == [("format", 0.5)]
    assert second["reward_parts"] is None
    assert (first["policy_version"], first["seed"], first["night"]) == (8, 90, date(2026, 3, 1))
