"""UFT's prompt file with hints, written by hand from its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign_dumps import read, write_rows

FILE = "experts/uft.parquet"


def test_the_pieces_of_a_hint_are_the_completion_of_an_expert() -> None:
    row = read("uft", FILE)[0]
    assert row.source == "uft.parquet:1"
    assert row.values == {
        "group_id": row.values["group_id"],
        "prompt_text": "2+2?",
        "completion": "Two and two\nis 4.",
        "origin": "expert",
        "reward": 1.0,
        "ground_truth": "4",
        "data_source": "sums",
    }


def test_a_prompt_without_a_hint_is_refused() -> None:
    assert read("uft", FILE)[1].problem == "the prompt has no hint"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": [{"role": "user", "content": "a"}], "hint": "b"}, "`hint` is no list of texts"),
        ({"prompt": [{"role": "user", "content": "a"}], "hint": [1]}, "`hint` is no list of texts"),
        ({"prompt": "a", "hint": ["b"]}, "`prompt` is no list of messages"),
    ],
)
def test_rows_of_other_types_are_refused(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    (found,) = read("uft", write_rows(tmp_path / "uft.parquet", [row]))
    assert found.problem == problem
