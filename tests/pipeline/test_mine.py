"""Mining: which rollouts it looks at, and what it records; its choices are in test_mine_properties.py."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from lake_worker import rollout

from pipeline.config import MiningConfig
from pipeline.errors import LakeError, MiningError
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.mine import FEW_TWINS, Mining, mine
from pipeline.schema import VERDICTS

Row = dict[str, Any]


def put(lake: Lake, *rows: Row) -> None:
    assert ingest(lake, rows, ["test"] * len(rows)).refused == 0


def group(name: str, entropy: float = 0.5, **changes: Any) -> list[Row]:
    values = {"completion_entropies": [entropy, entropy]}
    return [rollout(name, i) | values | changes for i in (0, 1)]


def clips_of(lake: Lake, mining: Mining) -> list[Row]:
    with lake.reader() as reader:
        sql = "select * from echo_clips where mining_id = $id order by clip_rank"
        return reader.rows(sql, {"id": mining.mining_id})


def newest(lake: Lake) -> int:
    with lake.reader() as reader:
        return reader.snapshot


def test_the_same_mining_of_the_same_rollouts_is_done_once(lake: Lake) -> None:
    put(lake, *group("a"))
    first = mine(lake, MiningConfig())
    assert mine(lake, MiningConfig()) == first
    assert mine(lake, MiningConfig(max_clips=9)).mining_id != first.mining_id
    with lake.reader() as reader:
        assert reader.rows("select count(*) as n from mining_runs") == [{"n": 2}]
        assert reader.rows("select count(*) as n from echo_clips") == [{"n": 2}]
    put(lake, *group("b"))
    assert mine(lake, MiningConfig()).groups == {"all_success": 2}


def test_an_older_snapshot_the_news_since_it_or_one_run_can_be_mined(lake: Lake) -> None:
    put(lake, *group("a", run_id="one"), rollout("c", 0) | {"run_id": "one"})
    then = newest(lake)
    put(lake, *group("b", run_id="two"), rollout("c", 1) | {"run_id": "one"})
    config = MiningConfig()
    old = mine(lake, config, snapshot=then)
    assert (old.groups, old.snapshot) == ({"all_success": 1, "incomplete": 1}, then)
    assert mine(lake, config).groups == {"all_success": 3}
    news = mine(lake, config, since_snapshot=then)
    assert {clip["group_id"] for clip in clips_of(lake, news)} == {"b", "c"}
    assert news.groups == {"all_success": 2}, "c with both its rollouts"
    assert mine(lake, config, since_snapshot=newest(lake)).groups == {}
    assert {clip["group_id"] for clip in clips_of(lake, mine(lake, config, run_id="two"))} == {"b"}


def test_a_group_that_spans_runs_is_for_each_run_what_that_run_holds_of_it(lake: Lake) -> None:
    for place, run in enumerate(["one", "one", "two", "two"]):
        entropy = 0.5 + place  # the best clip of all is of the other run
        row = rollout("a", place) | {"run_id": run, "completion_entropies": [entropy] * 2}
        put(lake, row | {"reward": 0.0 if place == 3 else 1.0})
    config = MiningConfig(scope="any_success", clips_per_group=4)
    one, two = (mine(lake, config, run_id=run) for run in ("one", "two"))
    assert (one.groups, two.groups) == ({"all_success": 1}, {"mixed": 1})
    assert sorted(clip["sample_index"] for clip in clips_of(lake, one)) == [0, 1]
    assert [clip["sample_index"] for clip in clips_of(lake, two)] == [2]
    assert sorted(clip["sample_index"] for clip in clips_of(lake, mine(lake, config))) == [0, 1, 2]


def judge(lake: Lake, group_id: str, reward: float, version: str, run_id: str | None = None) -> None:
    with lake.reader() as reader:
        sql = (
            "select rollout_id from rollouts "
            "where group_id = $group_id and ($run_id is null or run_id = $run_id) order by sample_index"
        )
        ids = reader.rows(sql, {"group_id": group_id, "run_id": run_id})
    verdict = {
        "verifier": "exact",
        "verifier_version": version,
        "reward": reward,
        "judged_at": datetime.now(UTC),
    }
    lake.commit({"verdicts": pa.Table.from_pylist([ids[0] | verdict], VERDICTS)})


def test_a_verdict_that_changes_a_reward_makes_its_group_news_and_one_that_agrees_does_not(
    lake: Lake,
) -> None:
    put(lake, *group("a", run_id="one"), *group("b", run_id="two"), *group("c", run_id="two"))
    config = MiningConfig()
    mine(lake, config)
    then = newest(lake)
    judge(lake, "b", 1.0, "2")
    assert mine(lake, config, since_snapshot=then).groups == {}
    judge(lake, "a", 0.0, "2")
    overturned = newest(lake)
    assert mine(lake, config, since_snapshot=then).groups == {"mixed": 1}
    judge(lake, "a", 1.0, "3")
    assert mine(lake, config, since_snapshot=then).groups == {}, "it counts as it did then"
    restored = mine(lake, config, since_snapshot=overturned)
    assert [clip["group_id"] for clip in clips_of(lake, restored)] == ["a"]


def test_a_group_that_spans_runs_is_judged_again_whole(lake: Lake) -> None:
    put(lake, rollout("a", 0) | {"run_id": "one"}, rollout("a", 1) | {"run_id": "two"})
    put(lake, *group("b", run_id="zero"))
    then = newest(lake)
    judge(lake, "a", 0.0, "2", run_id="two")
    assert mine(lake, MiningConfig(), since_snapshot=then).groups == {"mixed": 1}


def test_entropies_of_several_kinds_are_ranked_only_if_one_is_chosen(lake: Lake) -> None:
    put(lake, *group("a"), *group("b", entropy_kind="rescored"))
    with pytest.raises(MiningError, match=r"\(full_vocab, rescored\).*--entropy-kind"):
        mine(lake, MiningConfig())
    chosen = mine(lake, MiningConfig(entropy_kind="rescored"))
    assert [clip["group_id"] for clip in clips_of(lake, chosen)] == ["b"]


def test_policy_lag_counts_from_the_newest_version_of_the_same_model(lake: Lake) -> None:
    put(lake, *group("old", policy_version=1), *group("new", policy_version=9, reward=0.0))
    put(lake, *group("other", policy_version=2, model="other"))
    put(lake, *(row | {"origin": "expert"} for row in group("expert", policy_version=99)))
    mined = mine(lake, MiningConfig(max_policy_lag=7))
    assert (mined.clips, mined.dropped) == (1, {"policy_lag": 1})
    assert mine(lake, MiningConfig(max_policy_lag=8)).clips == 2
    assert mine(lake, MiningConfig(max_policy_lag=7, policy_version=8)).clips == 2


def test_a_group_with_an_unscored_success_waits(lake: Lake) -> None:
    waiting = {"completion_entropies": None, "entropy_kind": None}
    put(lake, rollout("a", 0), rollout("a", 1) | waiting, *group("b"))
    put(lake, rollout("c", 0), rollout("c", 1) | waiting | {"reward": 0.0})  # a failure need not be scored
    mined = mine(lake, MiningConfig(scope="any_success"))
    assert mined.dropped == {"unscored": 1}
    assert {clip["group_id"] for clip in clips_of(lake, mined)} == {"b", "c"}


def away(lake: Lake, runs: Iterable[str]) -> None:
    """Moves the data files of `rollouts` out of the lake that hold nothing but rows of these runs."""
    with lake.reader() as reader:
        sql = "select run_id, filename from rollouts where run_id in (select unnest($runs)) group by all"
        found = reader.rows(sql, {"runs": list(runs)})
    for path in {Path(row["filename"]) for row in found}:
        path.rename(lake.folder / path.name)


def test_mining_the_news_reads_the_files_of_the_new_runs_only(lake: Lake) -> None:
    for night in "1234":
        put(
            lake,
            *group(f"a{night}", run_id=f"2026-03-0{night}"),
            *group(f"b{night}", run_id=f"2026-03-0{night}"),
        )
    mine(lake, MiningConfig())
    then = newest(lake)
    put(lake, *group("new", run_id="2026-03-05"))
    away(lake, [f"2026-03-0{night}" for night in "1234"])
    mined = mine(lake, MiningConfig(), since_snapshot=then)
    assert (mined.groups, mined.clips) == ({"all_success": 1}, 1)
    with pytest.raises(LakeError, match="is missing"):
        mine(lake, MiningConfig())


def test_a_group_that_a_later_run_completes_is_mined_with_the_rows_of_the_earlier(lake: Lake) -> None:
    put(lake, rollout("a", 0) | {"run_id": "import-1", "reward": 0.0})
    put(lake, *group("b", run_id="import-5"))
    then = newest(lake)
    put(lake, rollout("a", 1) | {"run_id": "import-9"})
    assert mine(lake, MiningConfig(), since_snapshot=then).groups == {"mixed": 1}
    put(lake, rollout("a", 2) | {"run_id": None})
    assert mine(lake, MiningConfig(allow_partial=True), since_snapshot=then).groups == {"mixed": 1}


@pytest.mark.parametrize("splitters", [("newline-1", "newline-1"), ("newline-1", "given"), ("given", None)])
def test_a_copy_is_a_duplicate_whoever_split_it(lake: Lake, splitters: tuple[str | None, str | None]) -> None:
    tokens = {"completion_ids": [7, 8, 9, 10], "completion_entropies": [0.1, 0.2, 0.3, 0.9], "prompt_id": "p"}
    # whoever is given steps may have others of the same tokens; one rule has the same
    ends = [[2, 4], [2, 4] if splitters[1] == "newline-1" else [1, 4]]
    for name, splitter, step_ends in zip("ab", splitters, ends, strict=True):
        put(lake, *group(name, **tokens, splitter=splitter, step_ends=step_ends))
    put(
        lake,
        *group("c", **tokens | {"completion_ids": [7, 8, 9, 11]}, splitter="newline-1", step_ends=[2, 4]),
    )
    mined = mine(lake, MiningConfig())
    assert (mined.clips, mined.dropped) == (2, {"duplicate": 1})


def test_more_twins_than_a_list_holds_are_told_apart(lake: Lake) -> None:
    twins = [
        row
        for number in range(FEW_TWINS)
        for row in group(f"{number:02}", completion_ids=[number // 2, 1], prompt_id="p")
    ]
    put(lake, *twins, *group("last", prompt_id="p", completion_ids=[0, 1]))
    mined = mine(lake, MiningConfig())
    assert (mined.clips, mined.dropped) == (FEW_TWINS // 2, {"duplicate": FEW_TWINS // 2 + 1})


def test_a_run_or_snapshot_that_is_not_there_is_refused_and_leaves_no_mining(sample_lake):
    lake = sample_lake.lake
    with pytest.raises(MiningError, match="has no run nope"):
        mine(lake, MiningConfig(), run_id="nope")
    with pytest.raises(MiningError, match="no snapshot 5000"):
        mine(lake, MiningConfig(), since_snapshot=5000)
