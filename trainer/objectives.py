"""The losses, as pure functions. N tokens of R sequences lie flat, one sequence after the other.

Every loss divides by a count of the whole batch that the caller gives, so that the losses of its
micro-batches add up to the batch's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

REWARD_TOLERANCE = 1e-6
DEVIATION_EPSILON = 1e-6
MAX_LOG_RATIO = 20.0  # exp of more overflows where a policy has drifted far; verl clamps alike


def group_advantages(
    rewards: Tensor, group_index: Tensor, scale: bool, tolerance: float = REWARD_TOLERANCE
) -> Tensor:
    """Reward − group mean, divided by the group's deviation if `scale`; B rollouts.

    A group whose rewards spread by no more than `tolerance` gets exact zeros. Its deviation cannot tell:
    the mean of eight times 0.7 is not 0.7 in floating point, and noise over noise is of order 1.

    Args:
        rewards: [B], task rewards.
        group_index: [B] int64, which group each rollout is of.
        scale: GRPO (arXiv 2402.03300, eq. 3: deviation with ddof 1, plus 1e-6) if true, Dr. GRPO
            (arXiv 2503.20783) if false.

    Returns:
        [B] float32.
    """
    exact = rewards.to(torch.float64)
    advantages = torch.zeros_like(exact)
    for group in torch.unique(group_index):
        members = group_index == group
        of_group = exact[members]
        if of_group.max() - of_group.min() <= tolerance:
            continue
        deviation = of_group.std(correction=1) + DEVIATION_EPSILON if scale else 1.0
        advantages[members] = (of_group - of_group.mean()) / deviation
    return advantages.to(torch.float32)


def sequence_means(values: Tensor, lengths: Tensor) -> Tensor:
    """[R] mean of each sequence's tokens; 0 for a sequence without tokens.

    Args:
        values: [N].
        lengths: [R] int64, summing to N.
    """
    if not len(lengths):
        return values.new_zeros(0)
    sums = torch.segment_reduce(values, "sum", lengths=lengths)
    return sums / lengths.clamp_min(1)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    num_rollouts: int,
) -> Tensor:
    """Clipped policy-gradient loss with GRPO's normalisation: token mean per sequence, then batch mean.

    −(1/R) Σ_i (1/|y_i|) Σ_t min(ρ A_i, clip(ρ, 1 − clip_low, 1 + clip_high) A_i), ρ = exp(log π − log π_old)
    (arXiv 2402.03300, eq. 3, without the KL term).

    Args:
        logprobs: [N] under the policy, differentiable.
        old_logprobs: [N] under the policy that sampled.
        advantages: [R].
        lengths: [R] int64.
        num_rollouts: R of the whole batch.

    Returns:
        scalar; its gradient is exactly zero where the advantage is.
    """
    per_token = advantages.to(logprobs.dtype).repeat_interleave(lengths)
    log_ratio = (logprobs - old_logprobs.to(logprobs.dtype)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(ratio * per_token, clipped * per_token)
    return sequence_means(losses, lengths).sum() / max(num_rollouts, 1)


def clip_losses(logprobs: Tensor, lengths: Tensor) -> Tensor:
    """[C] mean negative log-likelihood of each clip's own tokens, nats per token.

    Args:
        logprobs: [N] of the clips' tokens, at temperature 1.
        lengths: [C] int64.
    """
    return -sequence_means(logprobs, lengths)


def echo_clip_loss(losses: Tensor, weights: Tensor, *, num_clips: int) -> Tensor:
    """The EchoClip term before λ: mean over the clips of weight × mean NLL (arXiv 2605.31228).

    Args:
        losses: [C] from `clip_losses`.
        weights: [C], the shard's; 1 counts a clip once.
        num_clips: C of the whole batch.
    """
    return (losses * weights.to(losses.dtype)).sum() / max(num_clips, 1)
