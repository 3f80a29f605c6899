"""verifiers' own files, written by verifiers 0.4.0 and 0.1.14."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from foreign_dumps import lines, read, values, write_lines

TEXT, TOKENS = "verifiers_old/results.jsonl", "verifiers_old/with_tokens/results.jsonl"


def test_a_trace_of_an_evaluation_is_a_rollout() -> None:
    row = read("verifiers", "verifiers/traces.jsonl")[0].values
    assert row == {
        "group_id": "eval-1/sums/sum-7",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
        "prompt_ids": [1, 2, 3, 4, 5],
        "completion_ids": [52, 128],
        "completion_logprobs": [-0.125, -0.25],
        "reward": 1.25,
        "reward_parts": {"correct": 1.0, "format": 0.25},
        "finish_reason": "stop",
        "model": "small",
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 32,
        "ground_truth": "4",
        "data_source": "sums",
        "verifier": "sums",
        "verifier_version": "verifiers 0.4.0+0123456789ab",
        "created_at": datetime(2026, 6, 1, 12, tzinfo=UTC),
        "night": date(2026, 6, 1),
    }


def test_a_trace_without_tokens_comes_as_text() -> None:
    row = read("verifiers", "verifiers/traces.jsonl")[1].values
    assert (row["completion"], row["messages"][1]["content"]) == ("4", "2+2?")
    assert not {"completion_ids", "prompt_ids", "completion_logprobs"} & row.keys()


def test_text_whose_thoughts_stand_apart_is_refused_since_its_tokens_are_unknown() -> None:
    row = read("verifiers", "verifiers/traces.jsonl")[2]
    assert row.problem == "the sampled message holds `reasoning_content` apart, so its tokens are unknown"


def test_a_trace_that_stands_alone_is_grouped_by_its_task() -> None:
    (row,) = values(read("verifiers", "verifiers/bare.jsonl"))
    assert row["group_id"].endswith("/sum-7")
    assert (row["completion_ids"], row["reward"]) == ([52, 128], 1.25)


def test_an_old_output_without_tokens_comes_as_text() -> None:
    first, cut_off, *_ = read("verifiers", TEXT)
    assert first.values == {
        "group_id": first.values["group_id"],
        "messages": [{"role": "user", "content": "2+2?"}],
        "completion": "4",
        "reward": 1.0,
        "reward_parts": {"correct": 1.0, "num_turns": 1.0},
        "finish_reason": "stop",
        "ground_truth": "4",
        "created_at": datetime(2026, 6, 1, 12, tzinfo=UTC),
        "night": date(2026, 6, 1),
    }
    assert first.values["group_id"].endswith("/7")
    assert (cut_off.values["finish_reason"], cut_off.values["reward"]) == ("length", 0.0)


def test_old_outputs_that_are_no_single_turn_or_have_no_verdict_are_refused() -> None:
    problems = [row.problem for row in read("verifiers", TEXT)]
    assert problems == [
        None,
        None,
        "several sampled turns: its completion has 3 messages",
        "the rollout failed: ValueError",
        "the rollout did not complete, so its reward says nothing",
    ]
    assert len({row.values["group_id"] for row in read("verifiers", TEXT)}) == 1


def test_an_old_trajectory_of_one_turn_has_tokens_and_logprobs() -> None:
    row = read("verifiers", TOKENS)[0].values
    assert row["prompt_ids"] == [1, 2, 3]
    assert row["completion_ids"] == [52, 128]
    assert row["completion_logprobs"] == [-0.125, -0.125]
    assert row["messages"] == [{"role": "user", "content": "2+2?"}]


def test_an_old_trajectory_with_tokens_of_the_environment_is_refused() -> None:
    assert [row.problem for row in read("verifiers", TOKENS)[1:]] == [
        "several sampled turns: its trajectory has 2",
        "several sampled turns: `completion_mask` has other tokens between sampled ones",
        "nothing was sampled: the prompt left no room",
    ]


def test_an_old_prompt_that_is_plain_text_is_what_the_model_read(tmp_path: Path) -> None:
    row = lines(TEXT)[0] | {"prompt": "2+2=", "completion": "4", "task": "sums"}
    (found,) = values(read("verifiers", write_lines(tmp_path / "results.jsonl", [row])))
    assert (found["prompt_text"], found["completion"]) == ("2+2=", "4")
    assert found["group_id"].endswith("/sums/7")
    assert found["data_source"] == "sums"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"completion_ids": [1.5]}, "`completion_ids` is no list of token ids"),
        ({"completion_logprobs": [-0.5]}, "`completion_logprobs` has 1 values for 2 sampled tokens"),
        ({"completion_mask": [0, 1]}, "several sampled turns: the completion starts with tokens"),
        ({"prompt_ids": None}, "`prompt_ids` is no list of token ids"),
    ],
)
def test_old_tokens_that_do_not_fit_are_refused(tmp_path: Path, changes, problem) -> None:
    row = lines(TOKENS)[0]
    row["trajectory"][0]["tokens"] |= changes
    (found,) = read("verifiers", write_lines(tmp_path / "results.jsonl", [row]))
    assert found.problem is not None
    assert found.problem.startswith(problem)


def test_images_in_a_prompt_without_tokens_are_refused(tmp_path: Path) -> None:
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    row = lines(TEXT)[0] | {"prompt": [{"role": "user", "content": image}]}
    (found,) = read("verifiers", write_lines(tmp_path / "results.jsonl", [row]))
    assert found.problem == "`prompt` holds a message that is not text alone"
