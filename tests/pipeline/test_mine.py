"""Mining: which rollouts it looks at, and what it records; its choices are in test_mine_properties.py."""

from __future__ import annotations

from typing import Any

import pytest
from lake_worker import rollout

from pipeline.config import MiningConfig
from pipeline.errors import MiningError
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.mine import Mining, mine

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


def test_a_run_or_snapshot_that_is_not_there_is_refused_and_leaves_no_mining(sample_lake):
    lake = sample_lake.lake
    with pytest.raises(MiningError, match="has no run nope"):
        mine(lake, MiningConfig(), run_id="nope")
    with pytest.raises(MiningError, match="no snapshot 5000"):
        mine(lake, MiningConfig(), since_snapshot=5000)
