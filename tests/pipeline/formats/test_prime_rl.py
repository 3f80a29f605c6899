"""prime-rl's traces: episodes written by verifiers 0.4.0, annotations and exports by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from foreign_dumps import DUMPS, lines, read, values, write_lines

from pipeline.errors import FormatError

FILE = "prime_rl/rollouts/step_4/train/all/traces.jsonl"
STREAM = "prime_rl/monitors/file/traces/stream.jsonl"
[SOLVED, *_] = lines(FILE)


def changed(tmp_path: Path, node: int = 2, trace: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The first trace with changes, read again."""
    (episode,) = lines(FILE)[:1]
    episode["traces"][0] |= trace or {}
    episode["traces"][0]["nodes"][node] |= changes
    (row,) = read("prime-rl", write_lines(tmp_path / "traces.jsonl", [episode]))
    return row


def test_a_trace_is_a_rollout_of_the_group_its_trainer_named() -> None:
    row = read("prime-rl", FILE)[0]
    assert row.source == "traces.jsonl:1"
    assert row.values["group_id"] == "run-1/sums/g1"
    assert row.values["prompt_ids"] == [1, 2, 3, 4, 5]
    assert row.values["completion_ids"] == [52, 128]
    assert row.values["model"] == "small"
    assert row.values["ground_truth"] == "4"


def test_the_reward_is_the_sum_of_scores_times_weights(tmp_path: Path) -> None:
    assert "reward" not in SOLVED["traces"][0]
    row = read("prime-rl", FILE)[0].values
    assert (row["reward"], row["reward_parts"]) == (1.25, {"correct": 1.0, "format": 0.25})
    rewards = {"a": {"score": 2.0, "weight": 0.0}, "b": {"score": 0.5}, "c": None}
    assert changed(tmp_path, trace={"rewards": rewards}).values["reward"] == 0.5


def test_logprobs_are_compact_and_belong_to_the_sampled_tokens() -> None:
    row = read("prime-rl", FILE)[0].values
    node = SOLVED["traces"][0]["nodes"][2]
    assert (len(node["token_ids"]), node["logprobs"]) == (3, [-0.125, -0.25])
    assert row["completion_logprobs"] == [-0.125, -0.25]


def test_a_message_without_parent_is_the_first_since_none_is_left_out() -> None:
    assert "parent" not in SOLVED["traces"][0]["nodes"][0]
    assert read("prime-rl", FILE)[0].values["prompt_ids"][:2] == [1, 2]


def test_the_policy_is_the_oldest_that_sampled_and_unknown_if_it_was_frozen() -> None:
    rows = read("prime-rl", FILE)
    assert SOLVED["run"]["work"]["policy"] == {"start": 2, "end": 3}
    assert rows[0].values["policy_version"] == 2
    assert "policy_version" not in rows[6].values


def test_a_call_that_ran_into_its_length_is_cut_off(tmp_path: Path) -> None:
    assert read("prime-rl", FILE)[1].values["finish_reason"] == "length"
    assert changed(tmp_path).values["finish_reason"] == "stop"
    limited = changed(tmp_path, trace={"stop_condition": "max_total_tokens"})
    assert limited.values["finish_reason"] == "length"


def test_what_is_no_scored_single_turn_of_the_policy_is_refused_in_plain_words() -> None:
    rows = read("prime-rl", FILE)
    assert [row.problem for row in rows[2:]] == [
        "several sampled turns",
        "the rollout failed: ToolError: no such tool",
        "it has no rewards: scoring did not run",
        "sampled to evaluate a training run: clips of it would train on the test set",
        None,
        "the agent is not trained: its tokens are not the policy's",
        "the episode has no trace",
    ]
    groups = [row.values["group_id"].partition("/sums/")[2] for row in rows[:8]]
    assert groups == ["g1", "g1", "g1", "g2", "g2", "g3", "g4/solver", "g4/judge"]
    assert "group_id" not in rows[8].values
    assert rows[7].source == "traces.jsonl:7 trace 2"


def test_tokens_of_the_environment_within_a_message_are_refused(tmp_path: Path) -> None:
    row = changed(tmp_path, token_ids=[5, 52, 9, 128], mask=[False, True, False, True])
    assert row.problem == "several sampled turns: `mask` has other tokens between sampled ones"


def test_tokens_of_the_template_behind_a_message_are_left_out(tmp_path: Path) -> None:
    row = changed(tmp_path, token_ids=[5, 52, 128, 9], mask=[False, True, True, False]).values
    assert (row["prompt_ids"], row["completion_ids"]) == ([1, 2, 3, 4, 5], [52, 128])


def test_entropies_of_the_trainer_are_taken_as_rescored(tmp_path: Path) -> None:
    row = changed(tmp_path, entropies=[0.5, 0.75]).values
    assert (row["completion_entropies"], row["entropy_kind"]) == ([0.5, 0.75], "rescored")
    assert "entropy_kind" not in changed(tmp_path).values


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"logprobs": [-0.5]}, "`logprobs` has 1 values for 2 sampled tokens"),
        ({"entropies": 0.5}, "`entropies` has no list for 2 sampled tokens"),
        ({"mask": [True]}, "`mask` has 1 flags for 3 tokens"),
        ({"mask": [False] * 3}, "`mask` marks no sampled token"),
        ({"token_ids": [5, float("nan"), 128]}, "`token_ids` is no list of token ids"),
        ({"parent": 2}, "the `parent` of a message does not stand before it"),
        ({"parent": -1}, "the `parent` of a message does not stand before it"),
    ],
)
def test_a_message_that_contradicts_itself_is_refused(tmp_path: Path, changes, problem) -> None:
    assert changed(tmp_path, **changes).problem == problem


def test_annotations_beside_a_stream_bring_the_newest_entropies() -> None:
    solved, cut_off = values(read("prime-rl", STREAM))
    assert (solved["completion_entropies"], solved["entropy_kind"]) == ([0.5, 0.25], "rescored")
    assert "completion_entropies" not in cut_off  # one of its three is unknown


def test_annotations_are_found_beside_a_folder_of_chunks(tmp_path: Path) -> None:
    shutil.copytree(DUMPS / Path(STREAM).parent / "annotations", tmp_path / "annotations")
    (tmp_path / "stream").mkdir()
    chunk = shutil.copy(DUMPS / STREAM, tmp_path / "stream" / "00000.jsonl")
    assert values(read("prime-rl", Path(chunk))) == values(read("prime-rl", STREAM))


@pytest.mark.parametrize(
    "update",
    [
        {"branches": [{"index": 0, "entropies": [0.5]}]},
        {"branches": [{"index": 5, "entropies": [0.5] * 7}]},
        {"branches": [{"index": None, "entropies": 1}]},
        {"branches": 5, "entropies": 1},
        {"trace_id": None, "entropies": 1},
        'not JSON, with "entropies" in it\n',
    ],
)
def test_annotations_that_do_not_fit_change_nothing(tmp_path: Path, update: Any) -> None:
    path = write_lines(tmp_path / "stream.jsonl", [SOLVED])
    whole = values(read("prime-rl", path))
    write_lines(
        tmp_path / "annotations" / "a.jsonl",
        [update if isinstance(update, str) else {"trace_id": "solved"} | update],
    )
    assert values(read("prime-rl", path)) == whole


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("prime_rl/token_exports/step_4/rank_0.jsonl", "token exports hold neither rewards nor groups"),
        ("prime_rl/monitors/file/traces/annotations/trainer/00000.jsonl", "annotations hold no rollouts"),
    ],
)
def test_other_files_of_prime_rl_are_refused_with_the_one_to_give(file: str, why: str) -> None:
    with pytest.raises(FormatError, match=rf"{why}.* Give traces\.jsonl"):
        read("prime-rl", file)


def test_a_line_that_is_no_episode_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "traces.jsonl", [SOLVED, {"a": 1}, {"task": {}, "traces": [5]}])
    assert [row.problem for row in read("prime-rl", path)] == [
        None,
        "neither an Episode nor a Trace of verifiers",
        "the trace is no JSON object",
    ]
