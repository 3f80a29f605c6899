"""Columns of rows that are beyond doubt become what the same rows become one by one; the others stay out."""

from __future__ import annotations

import json
import random
from typing import Any

import orjson
import pyarrow as pa
import pytest
from sample_lake import EOS_ID, character_tokenizer

from pipeline.errors import EchoMineError
from pipeline.imports.columns import completed_columns
from pipeline.imports.context import ImportContext
from pipeline.imports.rows import completed_row
from pipeline.imports.types import columns_of_rows, columns_of_table
from pipeline.rollouts import unnamed_table

TOKENIZER = character_tokenizer()
NAN, INF = float("nan"), float("inf")

# What may stand in a column, right and wrong.
VALUES: dict[str, list[Any]] = {
    "group_id": ["a", "b", None, 7, ["a"]],
    "sample_index": [0, 3, None, -1, 1.0, True, 2**31, "1"],
    "prompt_ids": [[1, 2], [], None, [-1], [10**6], [1.5], ["1"], [None], [True], "12"],
    "prompt": ["2+2?", None, 3],
    "messages": [None, [{"role": "user", "content": "2+2?"}], [], [{"role": "user"}], "2+2?", [3]],
    "ground_truth": [None, "4", 4],
    "completion": [None, "given", 3],
    "completion_logprobs": [None, "like", [-1.0], [NAN], [[1.0]], "abc"],
    "completion_entropies": [None, "like", [-1.0], [INF], ["0.5"], [0.5] * 3],
    "entropy_kind": [None, "full_vocab", "rescored", "other", 3],
    "finish_reason": [None, "stop", "length", "bored", 1],
    "origin": [None, "policy", "expert", "nobody"],
    "reward": [1.0, 0, None, NAN, -INF, True, "1", 2**70, 10**17 + 1],
    "reward_parts": [None, {"a": 1.0, "b": 0}, {"a": None}, {"a": "x"}, 3],
    "policy_version": [None, 0, 7, -1, 2**70, "x"],
    "group_size": [None, 4, 0],
    "max_tokens": [None, 512, 0],
    "temperature": [None, 1.0, 1, -0.5],
    "night": [None, "2026-02-03", "yesterday", 3],
    "created_at": [None, "2026-02-03T04:05:06+01:00", "2026-02-03T04:05:06", "yesterday"],
    "step_ends": [None, "whole", [0], [2, 2], [99], []],
    "tokenizer_hash": [None, "another"],
    "run_id": [None, "mine"],
    "seed": [None, 5, 2**63],
}


def drawn(draw: random.Random, wrong: float) -> dict[str, Any]:
    """A row of which each column is, with probability `wrong`, anything that may stand in it."""
    ids = [*TOKENIZER(draw.choice(["4\n#2", "\n\n4 \n x", "é", ""]))["input_ids"], EOS_ID][
        draw.randrange(2) :
    ]
    like = {"like": [draw.random() for _ in ids], "whole": [len(ids)] if ids else []}
    row = {"group_id": "a", "sample_index": draw.randrange(9), "prompt_ids": [1, 2], "completion_ids": ids}
    row |= {"completion_entropies": like["like"], "reward": 1.0}
    for name, values in VALUES.items():
        if draw.random() < wrong:
            value = draw.choice(values)
            row[name] = like.get(value, value) if isinstance(value, str) else value
    return row


def one_by_one(rows: list[Any], context: ImportContext) -> list[dict[str, Any] | None]:
    """The completed row of each, None where it is refused."""
    found: list[dict[str, Any] | None] = []
    for row in rows:
        try:
            complete = completed_row(row, context)
        except EchoMineError:
            found.append(None)
            continue
        words = {name: complete[name] for name in ("messages", "ground_truth", "data_source")}
        found.append(unnamed_table([complete]).to_pylist()[0] | words)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("wrong", [0.02, 0.1, 0.4])
def test_rows_beyond_doubt_are_completed_alike(seed: int, wrong: float) -> None:
    draw, context = random.Random(f"{seed} {wrong}"), ImportContext(TOKENIZER, "run")
    rows = [drawn(draw, wrong) for _ in range(120)]
    expected = one_by_one(rows, context)
    table, sure = completed_columns(columns_of_rows(rows), context)
    assert table.to_pylist() == [row for row, certain in zip(expected, sure, strict=True) if certain]
    # what is right is not left to the slow way, but for whole numbers that no float holds
    for row, good, certain in zip(rows, expected, sure, strict=True):
        assert good is None or certain or abs(row["reward"]) > 2**53, row


@pytest.mark.parametrize("seed", range(8))
def test_a_tables_columns_are_completed_as_its_rows(seed: int) -> None:
    draw, context = random.Random(seed), ImportContext(TOKENIZER, "run")
    rows = [drawn(draw, 0.0) for _ in range(50)]
    for row in rows:
        row["reward"] = draw.choice([0, 1, 2])
        row["prompt_ids"] = draw.choice([[1, 2], [], [-1], None])
        row["reward_parts"] = {"a": 1.0}
        if draw.random() < 0.2:
            row["completion_entropies"] = draw.choice([None, [-1.0], [INF] * len(row["completion_ids"])])
    table = pa.Table.from_pylist(rows)
    found, sure = completed_columns(columns_of_table(table), context)
    expected = one_by_one(table.to_pylist(), context)
    assert found.to_pylist() == [row for row, certain in zip(expected, sure, strict=True) if certain]
    assert [row is not None for row in expected] == sure.tolist()


def test_the_fast_parser_reads_what_the_slow_one_reads() -> None:
    draw = random.Random(0)
    for _ in range(200):
        row = {name: value for name, value in drawn(draw, 0.1).items() if value == value}
        text = json.dumps(row)
        if "NaN" not in text and "Infinity" not in text and str(2**70) not in text:
            assert orjson.loads(text) == json.loads(text)
