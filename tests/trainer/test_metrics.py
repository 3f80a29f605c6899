from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pipeline.config import MiningConfig
from trainer.metrics import StepMetrics, class_shares, group_class, reward_mean

GOLDEN = Path(__file__).parents[1] / "golden" / "echoclip.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["classes"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_group_has_the_class_that_mining_gives_it(case):
    options = dict(case["options"])
    group_size = options.pop("group_size", len(case["rewards"]))
    assert group_class(case["rewards"], group_size, MiningConfig(**options)) == case["group_class"]


def test_shares_count_a_group_that_lost_a_rollout_as_incomplete(make):
    judgements = [make.judged(1, 1), make.judged(1, None), make.judged(1, 0), make.judged(0.7, 0.7)]
    assert class_shares(judgements, 2, MiningConfig()) == {
        "all_success": 0.25,
        "all_fail": 0.0,
        "all_equal": 0.25,
        "mixed": 0.25,
        "incomplete": 0.25,
    }


def test_the_mean_reward_leaves_out_what_was_not_judged(make):
    assert reward_mean([make.judged(1, None), make.judged(0, 0.5)]) == 0.5
    assert reward_mean([make.judged(None)]) is None


def test_the_documentation_names_each_metric_in_its_order():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    table = page[page.index("| name | meaning |") :]
    named = re.findall(r"^\| `(\w+)` \| .+ \|$", table, re.MULTILINE)
    assert named == [field.name for field in dataclasses.fields(StepMetrics)]
