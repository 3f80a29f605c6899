"""AReaL's trajectories, written by hand from its source."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_dumps import lines, read, values, write_lines
from sample_lake import character_tokenizer

from pipeline.imports.core import import_rollouts, with_formats
from pipeline.lake import Lake

FILE = "areal/5/11.jsonl"
[ROW, *_] = lines(FILE)


def imported(lake: Lake, path: Path, column: str) -> list[int]:
    """A column of the lake's rollouts, sorted, once the dump is in it."""
    import_rollouts(lake, with_formats([path]), character_tokenizer())
    with lake.reader() as reader:
        return sorted(row[column] for row in reader.rows(f"select {column} from rollouts"))


def test_text_versions_and_rewards_come_as_they_stand() -> None:
    rows = read("areal", FILE)
    first, second, _, old = rows
    assert first.source == "11.jsonl:1"
    assert first.values == {
        "group_id": first.values["group_id"],
        "prompt_text": "<|im_start|>user\n2+2?",
        "completion": "4<|im_end|>",
        "reward": 1.0,
        "policy_version": 4,
    }
    assert second.values["reward"] == 0.0
    assert old.values["reward"] == 1.0


def test_the_reward_is_the_one_before_scaling(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ROW | {"reward": -3.0, "original_reward": 0.0}, ROW])
    assert [row["reward"] for row in values(read("areal", path))] == [0.0, 1.0]


def test_the_version_is_the_oldest_that_its_tokens_came_from(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ROW | {"head_version": 2, "tail_version": 9}])
    assert values(read("areal", path))[0]["policy_version"] == 2


def test_a_group_is_of_one_version_that_of_its_oldest_sample(lake, tmp_path: Path) -> None:
    heads = [ROW | {"sample_idx": index, "head_version": head} for index, head in enumerate((6, 4, 5))]
    other = ROW | {"task_id": 12, "head_version": 6}
    path = write_lines(tmp_path / "a.jsonl", [*heads, other])
    assert imported(lake, path, "policy_version") == [4, 4, 4, 6]


def test_a_version_that_no_token_came_from_is_none(tmp_path: Path) -> None:
    (row,) = values(read("areal", write_lines(tmp_path / "a.jsonl", [ROW | {"head_version": -1}])))
    assert "policy_version" not in row


def test_a_trajectory_of_several_segments_is_refused_and_keeps_its_place() -> None:
    _, _, turns, after = read("areal", FILE)
    assert turns.problem is not None
    assert turns.problem.startswith("several sampled turns")
    assert turns.values["group_id"] == after.values["group_id"]
    assert after.values["group_id"].endswith("/11")
    assert [row.sample_id for row in (turns, after)] == ["2", "3"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": None}, "`prompt` is None, no text"),
        ({"completion": [1, 2]}, "`completion` is [1, 2], no text"),
        ({"task_id": None}, "the row does not say which group it belongs to"),
        ({"task_id": True}, "the row does not say which group it belongs to"),
    ],
)
def test_a_row_without_its_texts_or_its_group_is_refused(tmp_path: Path, change, problem) -> None:
    (row,) = read("areal", write_lines(tmp_path / "a.jsonl", [ROW | change]))
    assert row.problem == problem
    assert change.items() <= row.values.items()


def test_samples_are_told_apart_by_their_number_and_those_without_one_by_their_row(lake, tmp_path) -> None:
    rows = [ROW | {"sample_idx": index} for index in (None, 2, None, 2, 1)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert imported(lake, path, "sample_index") == [0, 1, 2, 3]
