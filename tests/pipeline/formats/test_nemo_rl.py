"""NeMo-RL's training batches, written by hand from its source."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_dumps import lines, read, values, write_lines

FILE = "nemo_rl/train_data_step12.jsonl"
[ROW, *_] = lines(FILE)


def test_padding_goes_and_the_mask_tells_the_completion() -> None:
    first, second, _, overlong, other = read("nemo-rl", FILE)
    assert first.values == {
        "group_id": first.values["group_id"],
        "prompt_ids": [1, 2, 3, 4, 5],
        "completion_ids": [52, 128],
        "completion_logprobs": [-0.125, -0.125],
        "reward": 1.0,
        "policy_version": 12,
    }
    assert (second.values["completion_ids"], second.values["reward"]) == ([53, 128], 0.0)
    assert overlong.values["completion_ids"] == [52, 52, 52, 52]
    assert other.values["prompt_ids"] == [9, 2, 3, 4, 5]


def test_samples_of_one_prompt_and_step_are_a_group_and_another_step_is_another() -> None:
    rows = read("nemo-rl", FILE)
    groups = [row.values["group_id"] for row in rows]
    assert groups[0] == groups[1] == groups[2] == groups[3] != groups[4]
    (later,) = read("nemo-rl", "nemo_rl/train_data_step13.jsonl")
    assert later.values["group_id"] != groups[0]


def test_with_dynamic_sampling_the_filtered_rewards_are_those_of_the_rows() -> None:
    (row,) = values(read("nemo-rl", "nemo_rl/train_data_step13.jsonl"))
    assert row["reward"] == 1.0


def test_several_turns_are_refused_and_keep_their_place_in_the_group() -> None:
    first, _, turns, *_ = read("nemo-rl", FILE)
    assert turns.problem == "several sampled turns: `token_loss_mask` has other tokens between sampled ones"
    assert turns.values["group_id"] == first.values["group_id"]


def test_a_sample_that_the_trainer_left_out_counts_as_cut_off() -> None:
    assert read("nemo-rl", FILE)[3].values["finish_reason"] == "length"
    assert "finish_reason" not in read("nemo-rl", FILE)[0].values


def test_versions_that_wrote_no_tokens_are_refused_with_the_reason() -> None:
    (row,) = read("nemo-rl", "nemo_rl/without_tokens.jsonl")
    assert row.problem == "the row has no `token_ids`: this version of NeMo-RL did not write them"


def test_values_that_come_without_their_list_of_one_are_read_too(tmp_path: Path) -> None:
    bare = {name: value[0] if isinstance(value, list) else value for name, value in ROW.items()}
    path = write_lines(tmp_path / "train_data_step12.jsonl", [bare])
    (row,) = values(read("nemo-rl", path))
    first = dict(read("nemo-rl", FILE)[0].values)
    assert row | {"group_id": first["group_id"]} == first


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"input_lengths": [10]}, "`input_lengths` is 10 for 9 tokens"),
        ({"token_ids": [[float("nan")] * 9]}, "`token_ids` is no list of token ids"),
        ({"token_ids": [[-1] * 9]}, "`token_ids` is no list of token ids"),
        ({"token_loss_mask": [[1, 0]]}, "`token_loss_mask` has 2 flags for 9 tokens"),
        ({"token_loss_mask": [[0] * 9]}, "`token_loss_mask` marks no sampled token"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, change, problem) -> None:
    (row,) = read("nemo-rl", write_lines(tmp_path / "train_data_step1.jsonl", [ROW | change]))
    assert row.problem == problem
