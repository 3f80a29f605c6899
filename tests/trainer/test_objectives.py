from __future__ import annotations

import pytest
import torch

from trainer.objectives import (
    clip_losses,
    clipped,
    echo_clip_loss,
    expert_losses,
    fixed_length_mean,
    sequence_mean,
    sequence_means,
    sequence_ratios,
    surrogate_losses,
    token_mean,
    token_ratios,
)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_sequence_means_of_ragged_sequences_with_an_empty_one():
    values = double(1.0, 2.0, 3.0, 10.0).requires_grad_()
    means = sequence_means(values, torch.tensor([3, 0, 1]))
    assert means.tolist() == [2.0, 0.0, 10.0]
    means.sum().backward()
    assert values.grad.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_surrogate_losses_by_hand():
    # Ratio 1.5 with advantage 2: min(3, 1.3 * 2); 0.5 with -1: min(-0.5, 0.8 * -1); 1.5 with -1: not clipped.
    ratios, advantages = double(1.5, 1.0, 0.5, 1.5), double(2.0, 2.0, -1.0, -1.0)
    assert surrogate_losses(ratios, advantages, 0.2, 0.3).tolist() == pytest.approx([-2.6, -2.0, 0.8, 1.5])
    assert clipped(ratios, advantages, 0.2, 0.3).tolist() == [True, False, True, False]
    assert surrogate_losses(ratios, advantages, None, None).tolist() == pytest.approx([-3.0, -2.0, 0.5, 1.5])
    assert not clipped(ratios, advantages, None, None).any()
    assert surrogate_losses(ratios, advantages, None, 0.3).tolist() == pytest.approx([-2.6, -2.0, 0.5, 1.5])


def test_clipped_tokens_have_no_gradient_unless_it_hurts():
    logprobs = double(1.5, 1.0, 0.5, 1.5).log().requires_grad_()
    ratios = token_ratios(logprobs, torch.zeros(4, dtype=torch.float64))
    surrogate_losses(ratios, double(2.0, 2.0, -1.0, -1.0), 0.2, 0.3).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -2.0, 0.0, 1.5])


def test_a_policy_far_off_gives_a_finite_loss_and_zero_advantage_stays_zero():
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    old = torch.tensor([-1000.0, 1000.0])
    for ratios in (token_ratios(logprobs, old), sequence_ratios(logprobs, old, torch.tensor([1, 1]))):
        loss = surrogate_losses(ratios, torch.zeros(2), None, None).sum()
        loss.backward()
        assert loss.item() == 0.0
        assert logprobs.grad.tolist() == [0.0, 0.0]


def test_gspos_ratio_is_the_geometric_mean_over_the_sequence():
    ratios = sequence_ratios(
        double(2.0, 8.0, 3.0).log(), double(1.0, 1.0, 1.0).log(), torch.tensor([2, 0, 1])
    )
    assert ratios.tolist() == pytest.approx([4.0, 4.0, 3.0])


def test_luffys_shaping_by_hand_and_where_its_gradient_is_greatest():
    logprobs = double(0.1, 0.9, 1e-30).log().requires_grad_()
    losses = expert_losses(logprobs, double(1.0, 1.0, 1.0), 0.1)
    assert losses.tolist() == pytest.approx([-0.5, -0.9, -1e-29])
    losses.sum().backward()
    # d f / d log π = π γ / (π + γ)²: at π = γ a quarter, for sure tokens little
    assert logprobs.grad.tolist() == pytest.approx([-0.25, -0.09, -1e-29])


def test_the_three_means_by_hand():
    losses, lengths = double(1.0, 3.0, 10.0), torch.tensor([2, 1, 0])
    assert sequence_mean(losses, lengths, 3).item() == pytest.approx((2 + 10) / 3)
    assert token_mean(losses, 3).item() == pytest.approx(14 / 3)
    assert fixed_length_mean(losses, 3, 8).item() == pytest.approx(14 / 24)


def test_echo_loss_is_the_mean_over_clips_not_over_tokens():
    logprobs = double(-1.0, -2.0, -3.0, -8.0).requires_grad_()
    losses = clip_losses(logprobs, torch.tensor([3, 1]))
    assert losses.tolist() == [2.0, 8.0]
    assert echo_clip_loss(losses, torch.ones(2), num_clips=2).item() == 5.0
    loss = echo_clip_loss(losses, torch.tensor([1.0, 0.5]), num_clips=2)
    assert loss.item() == 3.0
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-1 / 6, -1 / 6, -1 / 6, -1 / 4])
