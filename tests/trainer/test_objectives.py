from __future__ import annotations

import math

import pytest
import torch

from trainer.objectives import clip_losses, echo_clip_loss, group_advantages, grpo_loss, sequence_means

CLIPS = {"clip_low": 0.2, "clip_high": 0.3}


def advantages(rewards, scale, groups=None):
    index = torch.tensor(groups or [0] * len(rewards))
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), index, scale)


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


def test_interleaved_groups_keep_apart():
    mixed = advantages([1.0, 5.0, 0.0, 5.0], scale=False, groups=[7, 3, 7, 3])
    assert mixed.tolist() == [0.5, 0.0, -0.5, 0.0]


def test_sequence_means_of_ragged_sequences_with_an_empty_one():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64, requires_grad=True)
    means = sequence_means(values, torch.tensor([3, 0, 1]))
    assert means.tolist() == [2.0, 0.0, 10.0]
    means.sum().backward()
    assert values.grad.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_grpo_loss_by_hand():
    # Ratios 1.5 and 1.0 with advantage 2: min(3, 1.3 * 2) = 2.6 and 2, mean 2.3.
    # Ratio 0.5 with advantage -1: min(-0.5, 0.8 * -1) = -0.8. Loss: -(2.3 - 0.8) / 2.
    ratios = torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)
    loss = grpo_loss(
        ratios.log(),
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([2.0, -1.0]),
        torch.tensor([2, 1]),
        **CLIPS,
        num_rollouts=2,
    )
    assert loss.item() == pytest.approx(-0.75)


def test_grpo_gradients_by_hand():
    # Inside the clip range d loss / d log π = -A ρ / (|y| R); clipped tokens have none, unless it hurts.
    ratios = torch.tensor([1.5, 1.0, 0.5, 1.5], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    grpo_loss(
        logprobs,
        torch.zeros(4, dtype=torch.float64),
        torch.tensor([2.0, -1.0]),
        torch.tensor([2, 2]),
        **CLIPS,
        num_rollouts=2,
    ).backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.5, 0.0, 0.375])


def test_a_policy_far_off_gives_a_finite_loss_and_zero_advantage_stays_zero():
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    loss = grpo_loss(
        logprobs,
        torch.tensor([-1000.0, 1000.0]),
        torch.tensor([0.0, 0.0]),
        torch.tensor([1, 1]),
        **CLIPS,
        num_rollouts=2,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_echo_loss_is_the_mean_over_clips_not_over_tokens():
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -8.0], dtype=torch.float64, requires_grad=True)
    losses = clip_losses(logprobs, torch.tensor([3, 1]))
    assert losses.tolist() == [2.0, 8.0]
    assert echo_clip_loss(losses, torch.ones(2), num_clips=2).item() == 5.0
    loss = echo_clip_loss(losses, torch.tensor([1.0, 0.5]), num_clips=2)
    assert loss.item() == 3.0
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-1 / 6, -1 / 6, -1 / 6, -1 / 4])


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    random = torch.Generator().manual_seed(0)
    logprobs = torch.randn(9, generator=random, dtype=torch.float64)
    old, scores = torch.zeros(9, dtype=torch.float64), torch.tensor([1.0, -0.5, 2.0])
    whole = grpo_loss(logprobs, old, scores, torch.tensor([4, 3, 2]), **CLIPS, num_rollouts=3)
    parts = [
        grpo_loss(logprobs[:7], old[:7], scores[:2], torch.tensor([4, 3]), **CLIPS, num_rollouts=3),
        grpo_loss(logprobs[7:], old[7:], scores[2:], torch.tensor([2]), **CLIPS, num_rollouts=3),
    ]
    assert math.isclose(float(whole), float(sum(parts)), rel_tol=1e-14)
