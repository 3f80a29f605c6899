"""The cases of `tests/golden/echoclip.json`, computed by a second implementation, on the real path."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mining_reference import steps, walked

from pipeline.config import MiningConfig
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.mine import Mining, mine
from pipeline.steps import step_ends

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "echoclip.json").read_text())
CLIP_FIELDS = ("group_id", "group_rank", "sample_index", "step_index", "clip_tokens", "clip_rank")


def lake_rows(group_id: str, group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The golden group as rows of `rollouts`. Experts are nobody's sample, so group_size leaves them out."""
    asked_for = sum(rollout.get("origin") != "expert" for rollout in group)
    renamed = {"entropies": "completion_entropies"}
    return [
        {
            "group_id": group_id,
            "origin": "policy",
            "model": "golden",
            "prompt_ids": [1],
            "entropy_kind": "full_vocab",
            "group_size": asked_for,
        }
        | {renamed.get(name, name): value for name, value in rollout.items()}
        for rollout in group
    ]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Every golden group, and nothing else."""
    lake = Lake.create(tmp_path_factory.mktemp("golden") / "lake")
    rows = [row for group_id, group in GOLDEN["groups"].items() for row in lake_rows(group_id, group)]
    assert ingest(lake, rows, ["golden"] * len(rows)).written == len(rows)
    return lake


@pytest.fixture(scope="module")
def minings(lake: Lake) -> list[tuple[Mining, list[dict[str, Any]]]]:
    """What each golden mining gave, and its clips in rank order."""
    found = [mine(lake, MiningConfig(**case["options"])) for case in GOLDEN["mining"]]
    with lake.reader() as reader:
        clips = reader.rows("select * from echo_clips order by clip_rank")
    by_mining = defaultdict(list)
    for clip in clips:
        by_mining[clip["mining_id"]].append(clip)
    return [(mining, by_mining[mining.mining_id]) for mining in found]


@pytest.mark.parametrize(
    "number", range(len(GOLDEN["mining"])), ids=lambda n: json.dumps(GOLDEN["mining"][n]["options"])
)
def test_mining_gives_the_golden_clips(
    minings: list[tuple[Mining, list[dict[str, Any]]]], number: int
) -> None:
    case, (mining, clips) = GOLDEN["mining"][number], minings[number]
    assert mining.groups == case["groups"]
    assert mining.dropped == case["dropped"]
    assert mining.clips == len(clips) == len(case["clips"])
    for found, expected in zip(clips, case["clips"], strict=True):
        assert {name: found[name] for name in CLIP_FIELDS} == {name: expected[name] for name in CLIP_FIELDS}
        assert np.float32(found["step_entropy"]) == np.float32(expected["step_entropy"])
        assert set(expected) == {*CLIP_FIELDS, "step_entropy"}


@pytest.mark.parametrize("case", GOLDEN["mining"], ids=lambda case: json.dumps(case["options"]))
def test_the_reference_of_the_property_tests_gives_the_golden_clips(case: dict[str, Any]) -> None:
    rows = [
        {"policy_version": 0, "prompt_id": None, "finish_reason": "stop"} | row
        for name, group in GOLDEN["groups"].items()
        for row in lake_rows(name, group)
    ]
    classes, dropped, clips = walked(rows, MiningConfig(**case["options"]))
    assert (classes, dropped) == (case["groups"], case["dropped"])
    expected = [clip | {"step_entropy": np.float32(clip["step_entropy"])} for clip in case["clips"]]
    assert [clip | {"step_entropy": np.float32(clip["step_entropy"])} for clip in clips] == expected


def test_the_golden_clips_number_their_steps_and_name_their_rollouts(
    lake: Lake, minings: list[tuple[Mining, list[dict[str, Any]]]]
) -> None:
    with lake.reader() as reader:
        rollouts = {row["rollout_id"]: row for row in reader.rows("select * from rollouts")}
    for _, clips in minings:
        for clip in clips:
            rollout = rollouts[clip["rollout_id"]]
            assert (clip["group_id"], clip["sample_index"]) == (rollout["group_id"], rollout["sample_index"])
            assert clip["num_steps"] == len(rollout["step_ends"])
            assert clip["clip_tokens"] == rollout["step_ends"][clip["step_index"]]
            assert (clip["prompt_id"], clip["policy_version"]) == (
                rollout["prompt_id"],
                rollout["policy_version"],
            )


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The class that mining gives each golden case, by the case's name."""
    lake = Lake.create(tmp_path_factory.mktemp("classes") / "lake")
    cases_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rows = []
    for case in GOLDEN["classes"]:
        options = dict(case["options"])
        group_size = options.pop("group_size", len(case["rewards"]))
        run_id = json.dumps(options)  # a run for each set of options, so that one lake holds them all
        cases_of[run_id].append(case)
        for index, reward in enumerate(case["rewards"]):
            content = {"prompt_ids": [1], "completion_ids": [5], "completion_entropies": [0.5]}
            rows.append(
                content
                | {"group_id": case["name"], "prompt_id": case["name"], "run_id": run_id, "model": "golden"}
                | {"sample_index": index, "group_size": group_size, "reward": reward, "step_ends": [1]}
                | {"origin": "policy", "finish_reason": "stop", "policy_version": 0}
                | {"entropy_kind": "full_vocab"}
            )
    ingest(lake, rows, ["golden"] * len(rows))
    found = {}
    for run_id, cases in cases_of.items():
        options = json.loads(run_id)
        mined = mine(lake, MiningConfig(**options), run_id=run_id)
        assert sum(mined.groups.values()) == len(cases)
        for name in mined.groups:
            assert mined.groups[name] == sum(case["group_class"] == name for case in cases), (options, name)
        if len(cases) == 1:
            found[cases[0]["name"]] = next(iter(mined.groups))
    with lake.reader() as reader:
        for row in reader.rows("select group_id, group_class from groups where run_id = '{}'"):
            found[row["group_id"]] = row["group_class"]
        for case in cases_of['{"success_reward": 10.0}']:
            rewards = case["rewards"]
            sql = "select group_class($n, $n, $low, $high, success_reward := 10.0) as group_class"
            params = {"n": len(rewards), "low": min(rewards), "high": max(rewards)}
            found[case["name"]] = reader.rows(sql, params)[0]["group_class"]
        for case in cases_of['{"reward_tolerance": 0.25}']:
            rewards = case["rewards"]
            sql = "select group_class($n, $n, $low, $high, reward_tolerance := 0.25) as group_class"
            params = {"n": len(rewards), "low": min(rewards), "high": max(rewards)}
            found[case["name"]] = reader.rows(sql, params)[0]["group_class"]
    return found


@pytest.mark.parametrize("case", GOLDEN["classes"], ids=lambda case: case["name"])
def test_groups_have_their_golden_class(classes: dict[str, str], case: dict[str, Any]) -> None:
    assert classes[case["name"]] == case["group_class"]


@pytest.mark.parametrize("case", GOLDEN["splitting"], ids=lambda case: case["name"])
def test_completions_split_into_their_golden_steps(case: dict[str, Any]) -> None:
    assert step_ends(case["token_texts"], case["special_positions"]) == case["step_ends"]


@pytest.mark.parametrize("case", GOLDEN["splitting"], ids=lambda case: case["name"])
def test_the_reference_splits_into_the_golden_steps(case: dict[str, Any]) -> None:
    assert steps(case["token_texts"], case["special_positions"], "\n") == case["step_ends"]


@pytest.mark.parametrize("delimiter", [" ", "\t", "\u2028"])
@pytest.mark.parametrize("case", GOLDEN["splitting"], ids=lambda case: case["name"])
def test_another_delimiter_in_the_place_of_newlines_gives_the_golden_steps(
    case: dict[str, Any], delimiter: str
) -> None:
    texts = [text.replace(delimiter, "\r").replace("\n", delimiter) for text in case["token_texts"]]
    assert step_ends(texts, case["special_positions"], delimiter) == case["step_ends"]
