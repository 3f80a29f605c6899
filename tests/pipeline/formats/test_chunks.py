"""Groups that go on in another file of a stream: numbered over all files, none lost, none twice."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from foreign_dumps import lines, write_lines
from sample_lake import character_tokenizer

from pipeline.audits.core import audit
from pipeline.config import MiningConfig
from pipeline.imports.core import import_rollouts, with_formats
from pipeline.ingest import Ingested
from pipeline.lake import Lake

TOKENIZER = character_tokenizer()
SOLVED = lines("prime_rl/rollouts/step_4/train/all/traces.jsonl")[0]
PROBLEM = {"ok": False, "errors": [{"type": "ToolError", "message": "gone"}]}
ORDERS = pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["in order", "the other way round"])


def episode(name: str, score: float = 1.0, start: int = 2, token: int = 52, **trace: Any) -> dict[str, Any]:
    """An episode of version `start` whose answer is one token."""
    made: dict[str, Any] = copy.deepcopy(SOLVED)
    made["run"]["work"]["policy"]["start"] = start
    made["traces"][0]["nodes"][2]["token_ids"][1] = token
    rewards = {"correct": {"score": score, "weight": 1.0}}
    made["traces"][0] |= {"id": name, "rewards": rewards} | trace
    return made


def chunks(tmp_path: Path, *contents: Sequence[dict[str, Any]]) -> list[Path]:
    return [
        write_lines(tmp_path / "stream" / f"{number:05}.jsonl", list(content))
        for number, content in enumerate(contents)
    ]


def halves(tmp_path: Path, score: float = 1.0) -> list[Path]:
    """One group of 8: four solved under version 2, then four of the given score under version 3."""
    first = [episode(f"a{number}") for number in range(4)]
    return chunks(tmp_path, first, [episode(f"b{number}", score, start=3) for number in range(4)])


def taken(lake: Lake, *paths: Path) -> Ingested:
    return import_rollouts(lake, with_formats(paths), TOKENIZER).rows


def group(lake: Lake) -> tuple[Any, ...]:
    """Class, rollouts, size and indices of the only group."""
    with lake.reader() as reader:
        (found,) = reader.rows("select group_class, num_rollouts, group_size from groups")
        indices = reader.rows("select sample_index from rollouts order by all")
    return (*found.values(), [row["sample_index"] for row in indices])


@ORDERS
def test_a_group_of_two_chunks_is_whole_and_importing_it_again_changes_nothing(lake, tmp_path, order) -> None:
    paths = halves(tmp_path, score=0.0)
    assert taken(lake, *(paths[number] for number in order)) == Ingested(written=8)
    assert group(lake) == ("mixed", 8, 8, list(range(8)))
    assert taken(lake, *paths) == taken(lake, *paths[::-1]) == Ingested(known=8)
    assert [taken(lake, path) for path in paths] == [Ingested(known=4)] * 2
    assert group(lake) == ("mixed", 8, 8, list(range(8)))


def test_a_dump_in_chunks_is_the_same_rollouts_as_in_one_file(lake, tmp_path) -> None:
    paths = halves(tmp_path, score=0.0)
    whole = write_lines(tmp_path / "whole.jsonl", [row for path in paths for row in lines(str(path))])
    assert taken(lake, whole) == Ingested(written=8)
    assert taken(lake, *paths) == Ingested(known=8)


@ORDERS
def test_a_chunk_that_comes_later_joins_its_group_which_was_whole_until_then(lake, tmp_path, order) -> None:
    first, second = (halves(tmp_path, score=0.0)[number] for number in order)
    assert taken(lake, first) == Ingested(written=4)
    assert group(lake) == ("all_success" if order[0] == 0 else "all_fail", 4, 4, list(range(4)))
    assert taken(lake, second) == Ingested(written=4)
    assert group(lake) == ("mixed", 8, 8, list(range(8)))
    assert taken(lake, first, second) == Ingested(known=8)


def test_samples_of_the_same_words_and_reward_are_told_apart_by_their_names(lake, tmp_path) -> None:
    paths = halves(tmp_path)
    assert taken(lake, *paths) == Ingested(written=8)
    copied = write_lines(tmp_path / "copied.jsonl", lines(str(paths[0])))
    assert taken(lake, *paths, copied) == Ingested(known=12)
    assert group(lake) == ("all_success", 8, 8, list(range(8)))


@ORDERS
@pytest.mark.parametrize("together", [True, False], ids=["together", "one after the other"])
def test_a_rollout_that_failed_in_another_chunk_keeps_its_group_from_being_solved(
    lake, tmp_path, order, together
) -> None:
    failed = [episode("b0", token=53), episode("b1", **PROBLEM)]
    paths = chunks(tmp_path, [episode("a0"), episode("a1")], failed)
    given = [paths[number] for number in order]
    for files in [given] if together else [[path] for path in given]:
        taken(lake, *files)
    assert group(lake)[:3] == ("incomplete", 3, 4)


@ORDERS
def test_chunks_share_the_policy_version_of_the_groups_oldest_rollout(lake, tmp_path, order) -> None:
    paths = halves(tmp_path)
    taken(lake, *(paths[number] for number in order))
    with lake.reader() as reader:
        assert reader.rows("select distinct policy_version as v from rollouts") == [{"v": 2}]


def test_a_task_without_a_group_is_another_group_in_each_step(lake, tmp_path) -> None:
    steps = []
    for step in (4, 5):
        row = episode(f"s{step}")
        del row["group"]
        row["run"]["work"]["step"] = step
        steps.append(row)
    assert taken(lake, *chunks(tmp_path, *([row] for row in steps))) == Ingested(written=2)
    with lake.reader() as reader:
        found = reader.rows("select group_id, group_size from groups order by all")
    assert [tuple(row.values()) for row in found] == [
        ("run-1/sums/step 4/sum-7", 1),
        ("run-1/sums/step 5/sum-7", 1),
    ]


def test_two_contents_of_one_place_are_two_rollouts_of_which_one_was_lost(lake, tmp_path) -> None:
    row = {"group_id": "a", "prompt_ids": [50], "completion_ids": [52], "completion_entropies": [0.5]}
    rows = [
        row | {"sample_index": index, "reward": reward} for index, reward in ((0, 1.0), (1, 1.0), (1, 0.0))
    ]
    path = tmp_path / "dump.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert taken(lake, path) == Ingested(written=2, refused=1)
    assert group(lake) == ("incomplete", 2, 3, [0, 1])


@ORDERS
def test_an_audit_counts_the_groups_that_an_import_makes(tmp_path, order) -> None:
    paths = halves(tmp_path, score=0.0)
    found = audit([*(paths[number] for number in order), paths[0]], None, MiningConfig())
    assert {name: (figures.groups, figures.rollouts) for name, figures in found.classes.items()} == {
        "mixed": (1, 8)
    }
