"""Bad rows go to quarantine, the rest of the batch into the lake, in one commit."""

from __future__ import annotations

from typing import Any

import pytest
from lake_worker import rollout

from pipeline.config import MiningConfig
from pipeline.ingest import Ingested, ingest
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.quarantine import Refused


def put(lake: Lake, rows: list[dict[str, Any]], refused: list[Refused] | None = None) -> Ingested:
    return ingest(lake, rows, [f"dump:{number}" for number in range(1, len(rows) + 1)], (), refused or [])


def rows_of(lake: Lake, sql: str) -> list[dict[str, Any]]:
    with lake.reader() as reader:
        return reader.rows(sql)


def test_the_rest_of_a_batch_proceeds_and_the_refused_rows_are_kept(lake: Lake) -> None:
    rows = [rollout("a", 0), rollout("a", 1) | {"reward": float("nan")}, rollout("b", 0), rollout("b", 1)]
    earlier = Refused("the verifier died", "run", {"group_id": "c", "sample_index": 4})
    assert put(lake, rows, [earlier]) == Ingested(written=3, known=0, refused=2)
    kept = rows_of(lake, "select reason, source, group_id, sample_index from quarantine order by source")
    assert [tuple(row.values()) for row in kept] == [
        ("the reward is nan", "dump:2", "a", 1),
        ("the verifier died", "run", "c", 4),
    ]


def test_a_group_that_lost_a_rollout_is_incomplete_and_never_solved(lake: Lake) -> None:
    put(lake, [rollout("a", 0), rollout("a", 1) | {"completion_entropies": [0.5]}])
    put(lake, [rollout("b", i) | {"group_size": 3} for i in (0, 1)])
    mined = mine(lake, MiningConfig())
    assert (mined.groups, mined.clips) == ({"incomplete": 2}, 0)
    mined = mine(lake, MiningConfig(allow_partial=True))
    assert (mined.groups, mined.clips) == ({"all_success": 1, "incomplete": 1}, 1)


def test_the_same_batch_twice_changes_nothing(lake: Lake) -> None:
    rows = [rollout("a", 0), rollout("a", 1), rollout("a", 2) | {"reward": None}]
    assert put(lake, rows) == Ingested(written=2, known=0, refused=1)
    before = rows_of(lake, "select count(*) as n from quarantine union all select count(*) from rollouts")
    assert put(lake, rows) == Ingested(written=0, known=2, refused=1)
    after = rows_of(lake, "select count(*) as n from quarantine union all select count(*) from rollouts")
    assert after == before == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    "change", [{"completion_ids": [8, 8]}, {"prompt_ids": [3]}, {"reward": 0.0}], ids=lambda c: next(iter(c))
)
@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "in two"])
def test_a_taken_place_is_not_given_to_another_content(
    lake: Lake, change: dict[str, Any], together: bool
) -> None:
    first, second = [rollout("a", 0), rollout("a", 1)], [rollout("a", 1) | change]
    batches = [first + second] if together else [first, second]
    done = sum((put(lake, batch) for batch in batches), Ingested())
    assert done == Ingested(written=2, known=0, refused=1)
    (refused,) = rows_of(lake, "select reason, sample_index from quarantine")
    assert refused["reason"] == "duplicate: sample 1 of group a is there with another content"
    kept = rows_of(lake, "select completion_ids, prompt_ids, reward from rollouts where sample_index = 1")
    assert kept == [{name: rollout("a", 1)[name] for name in ("completion_ids", "prompt_ids", "reward")}]


def test_nothing_to_ingest_is_nothing_written(lake: Lake) -> None:
    assert put(lake, []) == Ingested()


def test_a_group_is_of_one_prompt_and_one_policy(tmp_path):
    lake = Lake.create(tmp_path / "lake")
    first = rollout("g", 0)
    ingest(lake, [first], ["a:1"])
    later = rollout("g", 1) | {"policy_version": (first.get("policy_version") or 0) + 7}
    other = rollout("g", 2) | {"prompt_id": "another"}
    done = ingest(lake, [later, other], ["a:2", "a:3"])
    assert (done.written, done.refused) == (0, 2)
    with lake.reader() as reader:
        reasons = reader.rows("select reason from quarantine")
    assert all("of one prompt, model and policy version" in row["reason"] for row in reasons)
