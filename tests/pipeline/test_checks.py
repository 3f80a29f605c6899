"""Each check finds the rows that it is there for, and a sound lake has none."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.checks import run_checks
from pipeline.hashing import content_id, ids_array
from pipeline.sqlfiles import sql_file

NAN, INF = float("nan"), float("inf")
FAULTS = [
    ("mismatched_entropies", {"completion_entropies": [0.1, 0.2]}),
    ("mismatched_logprobs", {"completion_logprobs": [-0.1, -0.2, -0.3, -0.4]}),
    ("impossible_entropies", {"completion_entropies": [0.1, -0.2, 0.3]}),
    ("impossible_entropies", {"completion_entropies": [0.1, NAN, 0.3]}),
    ("impossible_entropies", {"completion_entropies": [INF, 0.2, 0.3]}),
    ("impossible_entropies", {"completion_entropies": [None, 0.2, 0.3]}),
    ("broken_steps", {"step_ends": [1, 2]}),
    ("broken_steps", {"step_ends": [1, 4]}),
    ("broken_steps", {"step_ends": [0, 3]}),
    ("broken_steps", {"step_ends": [3, 3]}),
    ("broken_steps", {"step_ends": [None, 3]}),
    ("broken_steps", {"step_ends": None, "step_entropies": None, "completion_entropies": None}),
    ("broken_steps", {"step_ends": [], "step_entropies": []}),
    ("mismatched_step_entropies", {"step_entropies": [0.1]}),
    ("mismatched_step_entropies", {"step_entropies": None}),
    ("mismatched_step_entropies", {"completion_entropies": None}),
    ("duplicate_rollouts", {"rollout_id": "r0", "sample_index": 7}),
    ("duplicate_samples", {"sample_index": 0}),
    ("mixed_groups", {"policy_version": 7}),
    ("mixed_groups", {"prompt_id": "another"}),
    ("mixed_groups", {"model": "another"}),
]


def rollout(index: int) -> dict[str, object]:
    return {
        "rollout_id": f"r{index}",
        "group_id": "g",
        "prompt_id": "p",
        "origin": "policy",
        "model": "small",
        "policy_version": 0,
        "sample_index": index,
        "completion_ids": [5, 6, 7],
        "completion_logprobs": [-0.1, -0.2, -0.3],
        "completion_entropies": [0.1, 0.2, 0.3],
        "step_ends": [1, 3],
        "step_entropies": [0.1, 0.25],
        "reward": 1.0,
        "finish_reason": "stop",
    }


def found(sample_lake, rollouts: list[dict[str, object]], clips: list[dict[str, object]]) -> dict[str, int]:
    """The checks that found something, on tables that hold these rows only."""
    with sample_lake.lake.reader() as reader:
        reader.materialize_rows("rollouts", pa.Table.from_pylist(rollouts, schema.ROLLOUTS))
        reader.materialize_rows("echo_clips", pa.Table.from_pylist(clips, schema.ECHO_CLIPS))
        mine = {name for name, _ in FAULTS} | {"orphan_clips"}
        results = [check for check in run_checks(reader) if check.name in mine]
        return {check.name: check.num_offending for check in results if check.num_offending}


def test_a_sound_lake_passes_every_check(sample_lake):
    with sample_lake.lake.reader() as reader:
        results = run_checks(reader)
    assert {name for name, _ in FAULTS} | {"orphan_clips"} <= {result.name for result in results}
    assert {result.num_offending for result in results} == {0}


@pytest.mark.parametrize(("check", "fault"), FAULTS)
def test_a_check_finds_its_fault_and_no_other_does(sample_lake, check, fault):
    assert found(sample_lake, [rollout(0), rollout(1) | fault], []) == {check: 1}


def test_a_clip_without_its_rollout_is_found(sample_lake):
    clips = [{"mining_id": "m", "clip_id": name, "rollout_id": name} for name in ("r0", "r1", "r2")]
    assert found(sample_lake, [rollout(0), rollout(1)], clips) == {"orphan_clips": 1}


def test_clips_of_truncated_or_failed_rollouts_and_unscored_or_empty_ones_are_sound(sample_lake):
    truncated = rollout(0) | {"finish_reason": "length"}
    failed = rollout(1) | {"reward": 0.0}
    unscored = rollout(2) | {
        "completion_entropies": None,
        "step_entropies": None,
        "completion_logprobs": None,
    }
    lists = ("completion_ids", "completion_logprobs", "completion_entropies", "step_ends", "step_entropies")
    empty = rollout(3) | {name: [] for name in lists}
    clips = [{"mining_id": "m", "clip_id": name, "rollout_id": name} for name in ("r0", "r1")]
    assert found(sample_lake, [truncated, failed, unscored, empty], clips) == {}


def test_a_prompt_named_by_its_tokens_is_no_lost_one_whatever_their_ids(sample_lake):
    tokens = [[0], [255, 256], [70_000, 5, 2**31 - 1], []]
    rollouts = [rollout(i) | {"run_id": "r", "prompt_ids": ids} for i, ids in enumerate(tokens)]
    for row in rollouts:
        row["prompt_id"] = content_id("tokens", ids_array(row["prompt_ids"]))
    spoken = rollout(4) | {"run_id": "r", "prompt_ids": [3], "prompt_id": "held"}
    lost = rollout(5) | {"run_id": "r", "prompt_ids": [3], "prompt_id": content_id("lost")}
    with sample_lake.lake.reader() as reader:
        rows = pa.Table.from_pylist([*rollouts, spoken, lost], schema.ROLLOUTS)
        reader.materialize_rows("rollouts", rows)
        reader.materialize_rows("prompts", pa.Table.from_pylist([{"prompt_id": "held"}], schema.PROMPTS))
        offending = reader.rows(sql_file("checks/orphan_rollouts"))
    assert [row["rollout_id"] for row in offending] == ["r5"]
