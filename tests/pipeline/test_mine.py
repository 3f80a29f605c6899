"""Mining: what is chosen, from which rollouts, and that SQL and a plain walk of the rules agree."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lake_worker import rollout

from pipeline.config import MiningConfig
from pipeline.errors import LakeError, MiningError
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.mine import FEW_TWINS, Mining, mine

Row = dict[str, Any]
CLIP = ("group_id", "group_rank", "sample_index", "step_index", "clip_tokens", "clip_rank")


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
    for number in range(FEW_TWINS):
        tokens = {"completion_ids": [number // 2, 1], "prompt_id": "p"}
        put(lake, *group(f"{number:02}", **tokens))
    put(lake, *group("last", prompt_id="p", completion_ids=[0, 1]))
    mined = mine(lake, MiningConfig())
    assert (mined.clips, mined.dropped) == (FEW_TWINS // 2, {"duplicate": FEW_TWINS // 2 + 1})


def random_rows(draw: random.Random) -> list[Row]:
    """Groups with many ties, copies, losses, experts and empty completions."""
    rows = []
    for number in range(draw.randrange(2, 12)):
        size = draw.randrange(1, 5)
        style = draw.choice(["solved", "solved", "mixed", "failed"])
        facts = {
            "prompt_id": f"p{draw.randrange(3)}",
            "policy_version": draw.randrange(4),
            "group_size": size + draw.choice([0, 0, 0, 1]),
            "model": draw.choice(["m", "m", "n"]),
        }
        for index in range(size):
            num_tokens = draw.choice([0, 1, 2, 3, 5, 8])
            cuts = sorted({1 + draw.randrange(max(num_tokens, 1)) for _ in range(2)} | {num_tokens})
            reward = {"solved": 1.0, "failed": 0.0}.get(style, draw.choice([0.0, 0.5, 1.0]))
            changes = {
                "completion_ids": [draw.randrange(2) for _ in range(num_tokens)],
                "completion_entropies": [draw.randrange(4) / 4 for _ in range(num_tokens)],
                "step_ends": cuts if num_tokens else [],
                "reward": reward,
                "finish_reason": draw.choice(["stop"] * 5 + ["length"]),
                "origin": draw.choice(["policy"] * 4 + ["trainer", "expert"]),
            }
            rows.append(rollout(f"g{number:02}", index) | facts | changes)
    return rows


def random_config(draw: random.Random) -> MiningConfig:
    def maybe(value: Any) -> Any:
        return draw.choice([None, value])

    return MiningConfig(
        scope=draw.choice(["zero_advantage", "any_success"]),
        clips_per_group=draw.choice([1, 2, 5]),
        min_step_tokens=draw.choice([1, 1, 2]),
        max_clip_tokens=maybe(draw.randrange(1, 7)),
        min_step_entropy=draw.choice([0.0, 0.0, 0.25]),
        allow_truncated=draw.random() < 0.3,
        allow_partial=draw.random() < 0.5,
        min_group_size=draw.choice([1, 2]),
        max_policy_lag=maybe(draw.randrange(3)),
        policy_version=maybe(3),
        max_clips=maybe(draw.randrange(6)),
        max_clips_per_prompt=maybe(draw.randrange(4)),
        success_reward=draw.choice([1.0, 1.0, 0.5]),
        reward_tolerance=draw.choice([1e-6, 0.5]),
    )


def group_class(group: list[Row], config: MiningConfig) -> str:
    rewards, tolerance = [row["reward"] for row in group], config.reward_tolerance
    lost = len(group) < max(row["group_size"] for row in group)
    if len(group) < config.min_group_size or (lost and not config.allow_partial):
        return "incomplete"
    if max(rewards) - min(rewards) > tolerance:
        return "mixed"
    if min(rewards) >= config.success_reward - tolerance:
        return "all_success"
    return "all_fail" if max(rewards) <= config.fail_reward + tolerance else "all_equal"


def best_step(row: Row, config: MiningConfig) -> tuple[float, int, int] | None:
    """(entropy, step_index, end) of the candidate of highest entropy, the earliest on ties."""
    best, start = None, 0
    for index, end in enumerate(row["step_ends"]):
        entropy = float(np.float32(np.mean(row["completion_entropies"][start:end])))
        allowed = end - start >= config.min_step_tokens and end <= (config.max_clip_tokens or end)
        if allowed and (best is None or entropy > best[0]):
            best = entropy, index, end
        start = end
    return best


def walked(rows: list[Row], config: MiningConfig) -> tuple[Counter[str], Counter[str], list[Row]]:
    """The rules, one clip after the other."""
    rows = [row for row in rows if row["origin"] != "expert"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group_id"], []).append(row)
    classes = {name: group_class(group, config) for name, group in groups.items()}
    clips: list[Row] = []
    for name, members in groups.items():
        wanted = (
            {"all_success"} if config.scope == "zero_advantage" else set(classes.values()) - {"incomplete"}
        )
        if classes[name] not in wanted:
            continue
        found = []
        for row in members:
            verified = row["reward"] >= config.success_reward - config.reward_tolerance
            step = (
                best_step(row, config) if row["finish_reason"] != "length" or config.allow_truncated else None
            )
            if verified and step is not None:
                found.append((-step[0], row["sample_index"], step, row))
        for rank, (_, _, step, row) in enumerate(
            sorted(found, key=lambda f: f[:2])[: config.clips_per_group]
        ):
            clips.append(row | {"group_rank": rank, "step": step})
    clips.sort(key=lambda c: (-c["step"][0], c["group_id"], c["group_rank"]))
    dropped, kept, seen, of_prompt = Counter(), [], set(), Counter()
    for clip in clips:
        entropy, step_index, end = clip["step"]
        prompt, content = clip["prompt_id"], (clip["prompt_id"], tuple(clip["completion_ids"][:end]))
        current = config.policy_version
        if current is None:
            current = max(row["policy_version"] for row in rows if row["model"] == clip["model"])
        if entropy < config.min_step_entropy:
            dropped["step_entropy"] += 1
        elif config.max_policy_lag is not None and current - clip["policy_version"] > config.max_policy_lag:
            dropped["policy_lag"] += 1
        elif content in seen:
            dropped["duplicate"] += 1
        elif config.max_clips_per_prompt is not None and of_prompt[prompt] >= config.max_clips_per_prompt:
            dropped["max_clips_per_prompt"] += 1
        elif config.max_clips is not None and len(kept) >= config.max_clips:
            dropped["max_clips"] += 1
        else:
            of_prompt[prompt] += 1
            facts = {"step_index": step_index, "clip_tokens": end, "clip_rank": len(kept)}
            kept.append({name: (clip | facts)[name] for name in CLIP} | {"step_entropy": entropy})
        if entropy >= config.min_step_entropy and not (
            config.max_policy_lag is not None and current - clip["policy_version"] > config.max_policy_lag
        ):
            seen.add(content)
    return Counter(classes.values()), dropped, kept


def test_sql_and_a_plain_walk_of_the_rules_choose_the_same_clips(lake: Lake) -> None:
    draws, rows_of = [random.Random(seed) for seed in range(12)], []
    for seed, draw in enumerate(draws):
        # models of their own, so that no rows of another seed move the newest policy version
        names = {"run_id": f"run-{seed}"}
        rows = [row | names | {"group_id": f"{seed}-{row['group_id']}"} for row in random_rows(draw)]
        rows_of.append([row | {"model": f"{row['model']}-{seed}"} for row in rows])
    put(lake, *(row for rows in rows_of for row in rows))
    minings = [
        (seed, config, mine(lake, config, run_id=f"run-{seed}"))
        for seed, draw in enumerate(draws)
        for config in (random_config(draw), random_config(draw))
    ]
    with lake.reader() as reader:
        clips_found = reader.rows("select * from echo_clips order by clip_rank")
    reasons: Counter[str] = Counter()
    for seed, config, mined in minings:
        groups, dropped, clips = walked(rows_of[seed], config)
        found = [
            {name: clip[name] for name in (*CLIP, "step_entropy")}
            for clip in clips_found
            if clip["mining_id"] == mined.mining_id
        ]
        assert (mined.groups, mined.dropped, found) == (groups, dropped, clips), (seed, config)
        reasons += dropped + Counter(kept=len(clips))
    assert reasons.keys() == {
        "kept", "step_entropy", "policy_lag", "duplicate", "max_clips_per_prompt", "max_clips"
    }  # fmt: skip


def test_a_run_or_snapshot_that_is_not_there_is_refused_and_leaves_no_mining(sample_lake):
    lake = sample_lake.lake
    with pytest.raises(MiningError, match="has no run nope"):
        mine(lake, MiningConfig(), run_id="nope")
    with pytest.raises(MiningError, match="no snapshot 5000"):
        mine(lake, MiningConfig(), since_snapshot=5000)
