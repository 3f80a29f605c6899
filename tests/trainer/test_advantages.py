from __future__ import annotations

import pytest
import torch

from pipeline.objective_config import ObjectiveConfig
from trainer.advantages import batch_advantages, group_advantages, has_signal, overlong_share


def advantages(rewards, scale, groups=None, **options):
    index = torch.tensor(groups or [0] * len(rewards))
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), index, scale, **options)


def of_batch(rewards, groups, lengths, experts=None, max_tokens=10, **config):
    """Advantages and kept of `batch_advantages`, as lists."""
    taken, kept = batch_advantages(
        ObjectiveConfig(**config),
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups),
        torch.tensor(lengths),
        max_tokens=max_tokens,
        is_expert=None if experts is None else torch.tensor(experts),
    )
    return taken.tolist(), kept.tolist()


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("rewards", [[0.7] * 8, [1 / 3] * 6, [0.1] * 10, [1.0, 0.9999995], [1.0], [0.0] * 4])
def test_equal_rewards_have_exactly_zero_advantages(rewards, scale):
    assert advantages(rewards, scale).tolist() == [0.0] * len(rewards)
    in_float32 = group_advantages(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.int64), scale)
    assert in_float32.tolist() == [0.0] * len(rewards)


def test_advantages_by_hand():
    # mean 1/4; deviation with ddof 1: sqrt((9/16 + 3/16) / 3) = 1/2
    assert advantages([1.0, 0.0, 0.0, 0.0], scale=False).tolist() == [0.75, -0.25, -0.25, -0.25]
    scaled = advantages([1.0, 0.0, 0.0, 0.0], scale=True).tolist()
    assert scaled == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    with_epsilon = advantages([1.0, 0.0, 0.0, 0.0], scale=True, epsilon=0.25).tolist()
    assert with_epsilon == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


def test_interleaved_groups_keep_apart():
    mixed = advantages([1.0, 5.0, 0.0, 5.0], scale=False, groups=[7, 3, 7, 3])
    assert mixed.tolist() == [0.5, 0.0, -0.5, 0.0]


def test_every_objective_of_grpos_kind_takes_its_own_options():
    rewards, groups, lengths = [1.0, 0.0, 0.0, 0.0], [0] * 4, [1] * 4
    raw, scaled = [0.75, -0.25, -0.25, -0.25], pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    for objective in ("grpo", "dapo", "gspo", "uft"):
        assert of_batch(rewards, groups, lengths, objective=objective) == (scaled, [True] * 4)
        off = {"objective": objective, objective: {"scale_rewards": False}}
        assert of_batch(rewards, groups, lengths, **off) == (raw, [True] * 4)
        wide = {"objective": objective, objective: {"advantage_epsilon": 0.25}}
        assert of_batch(rewards, groups, lengths, **wide)[0][0] == pytest.approx(1.0)
    for objective in ("dr_grpo", "luffy"):
        assert of_batch(rewards, groups, lengths, objective=objective) == (raw, [True] * 4)
        on = {"objective": objective, objective: {"scale_rewards": True}}
        assert of_batch(rewards, groups, lengths, **on) == (scaled, [True] * 4)


def test_the_overlong_share_rises_over_the_buffer_only():
    lengths = torch.tensor([0, 6, 7, 8, 10])
    assert overlong_share(lengths, 10, 4).tolist() == [0.0, 0.0, 0.25, 0.5, 1.0]
    assert overlong_share(lengths, 10, 0).tolist() == [0.0] * 5


def test_dapos_overlong_shaping_lowers_a_long_success():
    # 10 tokens at most: the default buffer is its fifth, so 9 tokens lose half the penalty.
    taken, kept = of_batch(
        [1.0, 1.0, 0.0, 0.0],
        [0] * 4,
        [9, 8, 8, 8],
        objective="dapo",
        dapo={"scale_rewards": False, "overlong_penalty": 0.4},
    )
    assert taken == pytest.approx([0.8 - 0.45, 1.0 - 0.45, -0.45, -0.45])
    assert kept == [True] * 4


def test_dynamic_sampling_looks_at_the_task_reward_and_not_at_the_shaped_one():
    # Group 0: all succeed, one too long. Group 1: all fail. Group 2: mixed.
    rewards, groups, lengths = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0, 0, 1, 1, 2, 2], [10, 1, 1, 1, 1, 1]
    taken, kept = of_batch(rewards, groups, lengths, objective="dapo")
    assert kept == [False, False, False, False, True, True]
    assert taken[:4] == [0.0] * 4
    assert taken[4] == -taken[5] > 0.5
    taken, kept = of_batch(rewards, groups, lengths, objective="dapo", dapo={"dynamic_sampling": False})
    assert kept == [True] * 6
    assert taken[0] == -taken[1] < -0.5
    assert taken[2:4] == [0.0, 0.0]


def test_equal_within_the_tolerance_is_no_signal():
    rewards, groups = torch.tensor([0.5, 0.6, 0.0, 0.3]), torch.tensor([0, 0, 1, 1])
    assert has_signal(rewards, groups, 0.2).tolist() == [False, False, True, True]
    assert has_signal(rewards, groups).tolist() == [True] * 4


def test_luffys_advantages_are_over_all_or_over_the_policys_own_rollouts():
    rewards, groups, lengths, experts = [1.0, 1.0, 0.0, 0.0], [0] * 4, [1] * 4, [True, False, False, False]
    luffy = {"objective": "luffy", "experts": experts}
    assert of_batch(rewards, groups, lengths, **luffy)[0] == [0.5, 0.5, -0.5, -0.5]
    own = {"experts_in_statistics": False}
    taken, _ = of_batch(rewards, groups, lengths, **luffy, luffy=own)
    assert taken == pytest.approx([2 / 3, 2 / 3, -1 / 3, -1 / 3])
    taken, _ = of_batch(rewards, groups, lengths, **luffy, luffy=own | {"scale_rewards": True})
    assert taken == pytest.approx([x * 3**0.5 for x in (2 / 3, 2 / 3, -1 / 3, -1 / 3)], rel=1e-5)


def test_an_expert_among_failures_keeps_its_advantage_undivided():
    taken, _ = of_batch(
        [1.0, 0.0, 0.0],
        [0] * 3,
        [1] * 3,
        experts=[True, False, False],
        objective="luffy",
        luffy={"experts_in_statistics": False, "scale_rewards": True},
    )
    assert taken == [1.0, 0.0, 0.0]


def test_a_group_of_experts_alone_has_nothing_to_be_compared_with():
    taken, _ = of_batch(
        [1.0, 0.0],
        [0, 0],
        [1, 1],
        experts=[True, True],
        objective="luffy",
        luffy={"experts_in_statistics": False},
    )
    assert taken == [0.0, 0.0]


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "gspo", "luffy", "uft"])
def test_no_rollouts_have_no_advantages(objective):
    nothing = torch.zeros(0, dtype=torch.int64)
    taken, kept = batch_advantages(
        ObjectiveConfig(objective=objective), nothing.double(), nothing, nothing, max_tokens=10
    )
    assert (len(taken), len(kept)) == (0, 0)
