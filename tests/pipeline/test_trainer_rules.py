"""The rules of other trainers on groups of identical rewards, which carry no signal at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.audits.trainer_rules import RULES

BY_NAME = {rule.trainer: rule for rule in RULES}
SIZES = (4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
VALUES = sorted({k / d for d in (20, 7, 3) for k in range(1, d)})
GRID = [np.full(size, value) for value in VALUES for size in SIZES]

# Of 550 such groups, those that an earlier measurement counted as taken for signal. It names the values
# (k/20, k/7, k/3) and the range of sizes (4 to 32), not which of them; no product of plain choices gives 550
# groups with these counts. So the shares are compared, and this grid's own counts are held.
SHARES_OF_550 = {
    "verl": 121,
    "Trinity": 121,
    "TRL, metric": 271,
    "TRL, replay buffer": 284,
    "prime-rl": 284,
    "NeMo-RL": 214,
    "slime": 0,
    "SkyRL": 0,
}
COUNTS = {
    "verl": 62,
    "Trinity": 62,
    "TRL, metric": 127,
    "TRL, replay buffer": 140,
    "prime-rl": 140,
    "OpenRLHF": 270,  # it looks at the mean, and no mean here is 0 or 1
    "NeMo-RL": 117,
    "slime": 0,
    "SkyRL": 0,
}


def test_the_grid_has_27_values_between_0_and_1_and_10_sizes():
    assert (len(VALUES), len(GRID)) == (27, 270)


@pytest.mark.parametrize("trainer", BY_NAME)
def test_identical_rewards_taken_for_signal_are_as_many_as_counted(trainer):
    assert sum(BY_NAME[trainer].keeps(group) for group in GRID) == COUNTS[trainer]


@pytest.mark.parametrize("trainer", SHARES_OF_550)
def test_their_share_is_near_that_of_the_550_groups_measured_before(trainer):
    assert COUNTS[trainer] / len(GRID) == pytest.approx(SHARES_OF_550[trainer] / 550, abs=0.045)


def test_whether_verl_filters_equal_rewards_of_0_7_depends_on_the_size_of_the_group():
    assert BY_NAME["verl"].keeps(np.full(6, 0.7))
    assert not BY_NAME["verl"].keeps(np.full(8, 0.7))


@pytest.mark.parametrize(
    ("trainer", "size"), [("OpenRLHF", 0.92), ("verl", 0.056), ("TRL, metric", 0.0006), ("prime-rl", 6e-8)]
)
def test_the_phantom_advantage_of_8_rewards_of_0_7(trainer, size):
    found = BY_NAME[trainer].advantages(np.full(8, 0.7))
    assert np.abs(found).max() == pytest.approx(size, rel=0.01)


def test_openrlhf_turns_rounding_into_advantages_of_almost_1():
    largest = max(np.abs(BY_NAME["OpenRLHF"].advantages(group)).max() for group in GRID)
    assert largest == pytest.approx(0.971, abs=0.0005)  # 0.976 over the 550


@pytest.mark.parametrize("trainer", BY_NAME)
@pytest.mark.parametrize("rewards", [[1.0] * 8, [0.0] * 8, [0.5] * 4, [0.25] * 16])
def test_rewards_that_float32_and_sums_hold_exactly_have_no_phantom(trainer, rewards):
    rule = BY_NAME[trainer]
    if rule.advantages is not None:
        assert np.abs(rule.advantages(np.array(rewards))).max() == 0.0
    if trainer != "OpenRLHF":
        assert not rule.keeps(np.array(rewards))


@pytest.mark.parametrize("trainer", BY_NAME)
def test_every_rule_sees_the_signal_of_half_successes(trainer):
    assert BY_NAME[trainer].keeps(np.array([1.0, 0.0] * 4))


@pytest.mark.parametrize(
    ("trainer", "rewards"),
    [
        ("OpenRLHF", [-1.0, 1.0, -1.0, 1.0]),  # a mean of 0
        ("OpenRLHF", [2.0, 3.0]),
        ("NeMo-RL", [1.0, 0.0]),  # one sample is left beside each: 0 · ∞
        ("TRL, metric", [0.5, 0.5 + 2e-9]),
    ],
)
def test_real_differences_that_a_rule_does_not_see(trainer, rewards):
    assert not BY_NAME[trainer].keeps(np.array(rewards))


@pytest.mark.parametrize("trainer", ["verl", "TRL, metric", "OpenRLHF"])
def test_normalized_advantages_are_those_of_torch(trainer):
    rewards = np.array([0.1, 0.7, 1.0, 0.0, 0.3])
    scores = torch.tensor(rewards, dtype=torch.float32)
    wanted = (scores - scores.mean()) / scores.std()
    assert BY_NAME[trainer].advantages(rewards) == pytest.approx(wanted.double().numpy(), abs=5e-4)


def test_nemo_leaves_one_out():
    rewards = np.array([0.0, 0.0, 1.0, 1.0])
    found = BY_NAME["NeMo-RL"].advantages(rewards)
    others_std = np.sqrt((2 / 3 - (2 / 3) ** 2) * 3 / 2)
    assert found[0] == pytest.approx(-(2 / 3) / (others_std + 1e-6), rel=1e-5)
    assert found[3] == pytest.approx((2 / 3) / (others_std + 1e-6), rel=1e-5)
