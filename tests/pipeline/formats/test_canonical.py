"""The canonical dump, as users bring it: whole, scattered, twice, and with every kind of mistake."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_dumps import write_lines, write_rows
from sample_lake import EOS_ID, character_tokenizer

from pipeline.config import MiningConfig
from pipeline.errors import FormatError
from pipeline.imports.core import import_rollouts, with_formats
from pipeline.ingest import Ingested
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.records import Prompt
from pipeline.tokenization import tokenizer_hash

TOKENIZER = character_tokenizer()
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "echoclip.json").read_text())
WRITERS = [(write_lines, "jsonl"), (write_rows, "parquet")]


def dumped(group_id: str, sample_index: int, text: str = "4\n#2", **changes: Any) -> dict[str, Any]:
    """A row with the required columns only."""
    ids = [*TOKENIZER(text)["input_ids"], EOS_ID]
    return {
        "group_id": group_id,
        "sample_index": sample_index,
        "prompt_ids": [50, 51],
        "completion_ids": ids,
        "completion_entropies": [0.5 + i / 8 for i in range(len(ids))],
        "reward": 1.0,
    } | changes


def taken(lake: Lake, *files: Path) -> Ingested:
    return import_rollouts(lake, with_formats(files, "canonical"), TOKENIZER).rows


def rows_of(lake: Lake, sql: str) -> list[dict[str, Any]]:
    with lake.reader() as reader:
        return reader.rows(sql)


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_the_required_columns_are_enough_and_the_rest_has_its_default(lake, tmp_path, write, suffix) -> None:
    path = write(tmp_path / f"dump.{suffix}", [dumped("a", 0), dumped("a", 1, "#2")])
    assert taken(lake, path) == Ingested(written=2)
    first, second = rows_of(lake, "select * from rollouts order by sample_index")
    defaults = {"origin": "policy", "policy_version": 0, "finish_reason": "stop", "group_size": 2}
    defaults |= {"entropy_kind": "full_vocab", "logprobs_kind": None, "completion_logprobs": None}
    defaults |= {"tokenizer_hash": tokenizer_hash(TOKENIZER), "night": datetime.now(UTC).date()}
    assert defaults.items() <= first.items()
    assert first["run_id"].startswith("import-")
    assert (first["completion"], first["step_ends"], second["step_ends"]) == ("4\n#2", [2, 5], [3])
    assert first["step_entropies"] == [0.5625, 0.875]
    assert first["prompt_id"] == second["prompt_id"]


def test_what_a_dump_says_is_kept(lake: Lake, tmp_path: Path) -> None:
    said = {"policy_version": 7, "night": "2026-02-03", "created_at": "2026-02-03T04:05:06+01:00"}
    said |= {"model": "big", "group_size": 5, "finish_reason": "length", "reward_parts": {"format": 0.5}}
    said |= {"step_ends": [1, 5], "entropy_kind": "rescored", "run_id": "mine", "temperature": 0.6}
    taken(lake, write_lines(tmp_path / "dump.jsonl", [dumped("a", 0, **said)]))
    (row,) = rows_of(lake, "select * from rollouts")
    same = ("policy_version", "model", "group_size", "finish_reason", "step_ends", "entropy_kind", "run_id")
    assert {name: row[name] for name in same} == {name: said[name] for name in same}
    assert (row["night"], row["splitter"]) == (date(2026, 2, 3), "given")
    assert row["created_at"] == datetime(2026, 2, 3, 3, 5, 6, tzinfo=UTC)
    assert row["reward_parts"] == [("format", 0.5)]


def test_importing_twice_changes_nothing(lake: Lake, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "dump.jsonl", [dumped("a", 0), dumped("a", 1), "cut o\n"])
    assert taken(lake, path) == Ingested(written=2, refused=1)
    assert taken(lake, path) == Ingested(known=2, refused=1)
    assert rows_of(lake, "select count(*) as n from quarantine") == [{"n": 1}]


def test_the_same_file_named_twice_makes_no_group_larger(lake: Lake, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "dump.jsonl", [dumped("a", 0), dumped("a", 1)])
    assert taken(lake, path, path) == Ingested(written=2, known=2)
    assert mine(lake, MiningConfig()).groups == {"all_success": 1}


def test_groups_may_lie_scattered_over_files_of_both_kinds(lake: Lake, tmp_path: Path) -> None:
    first = write_lines(tmp_path / "one.jsonl", [dumped("a", 0), dumped("b", 0), dumped("a", 1)])
    second = write_rows(tmp_path / "two.parquet", [dumped("b", 1), dumped("a", 2)])
    assert taken(lake, first, second) == Ingested(written=5)
    sizes = rows_of(lake, "select distinct group_id, group_size from rollouts order by 1")
    assert [tuple(row.values()) for row in sizes] == [("a", 3), ("b", 2)]


def test_a_text_prompt_is_tokenized_and_kept(lake: Lake, tmp_path: Path) -> None:
    row = dumped("a", 0, prompt="2+2?", ground_truth=4)
    del row["prompt_ids"]
    taken(lake, write_lines(tmp_path / "dump.jsonl", [row]))
    prompt = Prompt(({"role": "user", "content": "2+2?"},), "4")
    (found,) = rows_of(lake, "select prompt_id, prompt_ids from rollouts")
    assert found == {"prompt_id": prompt.prompt_id, "prompt_ids": TOKENIZER("2+2?")["input_ids"]}
    assert rows_of(lake, "select prompt_id, ground_truth from prompts") == [
        {"prompt_id": prompt.prompt_id, "ground_truth": "4"}
    ]


def test_experts_and_rows_without_entropies_enter_and_yield_no_clip(lake: Lake, tmp_path: Path) -> None:
    unscored = {"completion_entropies": None}
    rows = [dumped("a", 0), dumped("a", 1), dumped("a", 2, "#3", origin="expert", reward=0.0)]
    rows += [dumped("b", 0, **unscored), dumped("b", 1)]
    taken(lake, write_lines(tmp_path / "dump.jsonl", rows))
    assert rows_of(lake, "select distinct group_size from rollouts") == [{"group_size": 2}]
    mined = mine(lake, MiningConfig())
    assert (mined.groups, mined.clips, mined.dropped) == ({"all_success": 2}, 1, {"unscored": 1})


BAD_ROWS = [
    ("cut o\n", "no JSON object"),
    ("[1, 2]\n", "no JSON object"),
    ("[" * 100_000 + "\n", "no JSON object"),
    ('{"group_id": "\\ud800"}\n', "no JSON object in valid Unicode"),
    ({"group_id": "a"}, "column `sample_index` is missing"),
    (dumped("a", 9, prompt_ids=None), "column `prompt_ids` is missing"),
    (dumped("a", -1), "sample_index a whole number"),
    (dumped("a", 1.5), "sample_index a whole number"),
    (dumped(7, 9), "group_id must be text"),
    (dumped("a", 9, reward=None), "the reward is missing"),
    (dumped("a", 9, reward=float("nan")), "the reward is nan"),
    (dumped("a", 9, reward="1"), "is no number"),
    (dumped("a", 9, completion_entropies=[0.1]), "completion_entropies has 1 values for 5"),
    (dumped("a", 9, completion_entropies=[-1, 0, 0, 0, 0]), "negative"),
    (dumped("a", 9, completion_entropies=[1e39] * 5), "NaN or infinite"),
    (dumped("a", 9, completion_entropies=[10**400] * 5), "NaN or infinite"),
    (dumped("a", 9, completion_entropies=["x"] * 5), "no list of numbers"),
    (dumped("a", 9, completion_logprobs=[-1.0]), "completion_logprobs has 1 values for 5"),
    (dumped("a", 9, completion_ids=[10**6], completion_entropies=[0.1]), "unknown tokenizer"),
    (dumped("a", 9, tokenizer_hash="another"), "unknown tokenizer another"),
    (dumped("a", 9, completion_ids="text"), "no list of token ids"),
    (dumped("a", 9, step_ends=[3]), "do not cover"),
    (dumped("a", 9, night="yesterday"), "no date"),
    (dumped("a", 9, created_at="yesterday"), "no time"),
    (dumped("a", 9, policy_version="seven"), "column `policy_version`"),
    (dumped("a", 9, finish_reason="bored"), "finish_reason must be one of"),
    (dumped("a", 0, "#3"), "duplicate: sample 0 of group a"),
]


def test_every_bad_row_is_quarantined_with_file_and_line_and_the_rest_proceeds(lake, tmp_path) -> None:
    path = write_lines(
        tmp_path / "dump.jsonl", [dumped("a", 0), *(row for row, _ in BAD_ROWS), dumped("b", 0)]
    )
    assert taken(lake, path) == Ingested(written=2, refused=len(BAD_ROWS))
    reasons = {row["source"]: row["reason"] for row in rows_of(lake, "select source, reason from quarantine")}
    assert len(reasons) == len(BAD_ROWS)
    for number, (_, reason) in enumerate(BAD_ROWS, start=2):
        assert reason in reasons[f"{path}:{number}"]
    assert mine(lake, MiningConfig()).groups == {"incomplete": 2}


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_a_column_that_math_sets_call_problem_is_the_users_own(lake, tmp_path, write, suffix) -> None:
    rows = [dumped("a", 0, problem="1+1?"), dumped("a", 1, problem="1+1?")]
    assert taken(lake, write(tmp_path / f"whole.{suffix}", rows)) == Ingested(written=2)
    rows = [dumped("b", 0, problem="2+2?"), dumped("b", None, problem="2+2?"), dumped("b", 2)]
    assert taken(lake, write(tmp_path / f"gap.{suffix}", rows)) == Ingested(written=2, refused=1)
    (refused,) = rows_of(lake, 'select source, reason, "row" from quarantine')
    assert refused["source"] == str(tmp_path / f"gap.{suffix}:2")
    assert refused["reason"] == "group_id must be text and sample_index a whole number from 0"
    assert json.loads(refused["row"])["problem"] == "2+2?"


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_messages_beside_the_prompts_tokens_may_be_the_whole_conversation(
    lake, tmp_path, write, suffix
) -> None:
    question = {"role": "user", "content": "1+1"}
    rows = [
        dumped("a", index, completion, messages=[question, {"role": "assistant", "content": completion}])
        for index, completion in enumerate(["#2", "1+1=2\n#2"])
    ]
    assert taken(lake, write(tmp_path / f"dump.{suffix}", rows)) == Ingested(written=2)
    prompts = rows_of(lake, "select prompt_id, messages from prompts")
    assert [json.loads(prompt["messages"]) for prompt in prompts] == [[question]]
    assert rows_of(lake, "select distinct prompt_id from rollouts") == [
        {"prompt_id": prompts[0]["prompt_id"]}
    ]


def test_two_columns_of_one_name_are_refused_in_one_line(lake: Lake, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([dumped("a", 0)])
    path = tmp_path / "twice.parquet"
    pq.write_table(table.append_column("reward", table["reward"]), path)
    with pytest.raises(FormatError, match=r"twice\.parquet has several columns `reward`\. Keep one"):
        taken(lake, path)


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_a_name_with_a_nul_is_refused_and_one_with_a_quote_is_not(lake, tmp_path, write, suffix) -> None:
    names = ["a\0b", "it's", "c"]
    path = write(tmp_path / f"dump.{suffix}", [dumped(name, 0, run_id=name) for name in names])
    assert taken(lake, path) == Ingested(written=2, refused=1)
    assert taken(lake, path) == Ingested(known=2, refused=1)
    assert rows_of(lake, "select run_id from rollouts order by all") == [{"run_id": "c"}, {"run_id": "it's"}]
    (refused,) = rows_of(lake, "select reason from quarantine")
    assert refused["reason"] == "column `group_id` holds a NUL character"


def test_a_file_that_cannot_be_read_whole_is_refused_before_anything_is_written(lake, tmp_path) -> None:
    good = write_lines(tmp_path / "good.jsonl", [dumped("a", 0)])
    lacking = dumped("a", 0)
    lacking["completion_entropy"] = lacking.pop("completion_entropies")
    cut = write_rows(tmp_path / "cut.parquet", [dumped("a", 0)])
    cut.write_bytes(cut.read_bytes()[:-30])
    (tmp_path / "dump.csv").write_text("")
    mistakes = [
        (tmp_path / "none.jsonl", "There is no file"),
        (tmp_path / "dump.csv", r"neither \.parquet nor \.jsonl"),
        (cut, "is no complete Parquet file"),
        (
            write_rows(tmp_path / "lacks.parquet", [lacking]),
            "no column `completion_entropies`: did you mean `completion_entropy`",
        ),
    ]
    for path, message in mistakes:
        with pytest.raises(FormatError, match=message):
            taken(lake, good, path)
    assert rows_of(lake, "select * from rollouts") == []


def test_golden_groups_brought_by_import_are_mined_alike(lake: Lake, tmp_path: Path) -> None:
    rows = []
    for group_id, group in GOLDEN["groups"].items():
        for rollout in group:
            ids = [token % EOS_ID for token in rollout["completion_ids"]]
            row = rollout | {"group_id": group_id, "prompt_ids": [1], "completion_ids": ids}
            row["completion_entropies"] = row.pop("entropies")
            rows.append(row)
    assert taken(lake, write_lines(tmp_path / "golden.jsonl", rows)) == Ingested(written=len(rows))
    for case in (GOLDEN["mining"][0], GOLDEN["mining"][2]):
        mined = mine(lake, MiningConfig(**case["options"]))
        assert (mined.groups, mined.dropped) == (case["groups"], case["dropped"])
        with lake.reader() as reader:
            sql = "select * from echo_clips where mining_id = $id order by clip_rank"
            clips = reader.rows(sql, {"id": mined.mining_id})
        expected = [
            clip | {"step_entropy": float(np.float32(clip["step_entropy"]))} for clip in case["clips"]
        ]
        assert [{name: clip[name] for name in expected[0]} for clip in clips] == expected
