"""LUFFY's prompt file with targets, written by hand from its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from foreign_dumps import DUMPS, FORMATS, read, values, write_rows

from pipeline.errors import FormatError

FILE = "experts/luffy.parquet"
PROMPT = [{"role": "user", "content": "2+2?"}]
TARGET = [{"role": "assistant", "content": "4"}, {"role": "assistant", "content": "four"}]


def written(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    return write_rows(tmp_path / "luffy.parquet", rows)


def test_a_target_is_the_completion_of_an_expert() -> None:
    row = read("luffy", FILE)[0]
    assert row.source == "luffy.parquet:1"
    assert row.values == {
        "group_id": row.values["group_id"],
        "messages": PROMPT,
        "completion": "<think>\nTwo and two.\n</think>\n4",
        "origin": "expert",
        "reward": 1.0,
        "ground_truth": "4",
        "data_source": "sums",
    }


def test_another_model_s_probabilities_are_no_logprobs() -> None:
    assert "target_ds_qwen_7b_probs" in pq.read_schema(DUMPS / FILE).names
    assert "completion_logprobs" not in read("luffy", FILE)[0].values


def test_prompts_without_a_target_are_refused() -> None:
    assert [row.problem for row in read("luffy", FILE)] == [None, *["the prompt has no target"] * 2]


def test_of_several_messages_the_first_is_taken(tmp_path: Path) -> None:
    (row,) = values(read("luffy", written(tmp_path, {"prompt": PROMPT, "target": TARGET})))
    assert row["completion"] == "4"


def test_rows_of_a_file_with_the_same_prompt_and_truth_are_a_group(tmp_path: Path) -> None:
    row = {"prompt": PROMPT, "target": TARGET, "reward_model": {"ground_truth": "4"}}
    other = row | {"reward_model": {"ground_truth": "5"}}
    first, second, third = values(read("luffy", written(tmp_path, row, row, other)))
    assert first["group_id"] != read("luffy", FILE)[0].values["group_id"]
    assert second["group_id"] == first["group_id"]
    assert third["group_id"] != first["group_id"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": PROMPT, "target": "4"}, "`target` is no list of messages"),
        ({"prompt": PROMPT, "target": ["4"]}, "`target` is no list of messages"),
        ({"prompt": PROMPT, "target": PROMPT}, "`target` is a message of 'user', not of the assistant"),
        ({"prompt": PROMPT, "target": [{"role": "assistant", "content": 5}]}, "`target` holds a message"),
        ({"prompt": "2+2?", "target": TARGET}, "`prompt` is no list of messages"),
        ({"prompt": [], "target": TARGET}, "`prompt` is no list of messages"),
    ],
)
def test_rows_of_other_types_are_refused(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    (found,) = read("luffy", written(tmp_path, row))
    assert found.problem is not None
    assert found.problem.startswith(problem)


def test_a_file_that_is_cut_off_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    path.write_bytes((DUMPS / FILE).read_bytes()[:-20])
    assert not FORMATS["luffy"].recognizes(path)
    with pytest.raises(FormatError, match=r"cut\.parquet is no complete Parquet file"):
        read("luffy", path)
