"""The terms of every objective, as pure functions. N tokens of R sequences lie flat, one after the other.

Every mean divides by a count of the whole batch that the caller gives, so that the losses of its
micro-batches add up to the batch's loss. `trainer/policy_loss.py` says which objective is made of which.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp of more overflows where a policy has drifted far; verl clamps alike


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


def token_ratios(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """[N] ρ_t = π(y_t) / π_old(y_t) (arXiv 2402.03300, eq. 3).

    Args:
        logprobs: [N] nats, under the policy, differentiable.
        old_logprobs: [N] nats, under the policy that sampled.
    """
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratios(logprobs: Tensor, old_logprobs: Tensor, lengths: Tensor) -> Tensor:
    """[N] s_i = (π(y_i) / π_old(y_i))^(1/|y_i|) at each token of y_i: GSPO (arXiv 2507.18071, eq. 7).

    Args:
        logprobs: [N] nats, differentiable.
        old_logprobs: [N] nats.
        lengths: [R] int64.
    """
    means = sequence_means(logprobs - old_logprobs, lengths)
    return means.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().repeat_interleave(lengths)


def surrogate_losses(
    ratios: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> Tensor:
    """[N] −min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A); its gradient is exactly 0 where A is.

    Source: arXiv 2402.03300, eq. 3, without the KL term; TRL `_compute_loss`, verl
    `compute_policy_loss_vanilla`. Two ends apart are DAPO's clip-higher (arXiv 2503.14476, eq. 10).

    Args:
        ratios: [N].
        advantages: [N].
        clip_low: None for no clip below, as LUFFY's `loss_remove_clip` has it.
        clip_high: None for no clip above.
    """
    low = -math.inf if clip_low is None else 1 - clip_low
    high = math.inf if clip_high is None else 1 + clip_high
    return -torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages)


def clipped(ratios: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """[N] bool: the tokens that `surrogate_losses` gives no gradient because their ratio is clipped."""
    low = -math.inf if clip_low is None else 1 - clip_low
    high = math.inf if clip_high is None else 1 + clip_high
    return ((ratios < low) & (advantages < 0)) | ((ratios > high) & (advantages > 0))


def expert_losses(logprobs: Tensor, advantages: Tensor, gamma: float) -> Tensor:
    """[N] −f(π) A with f(π) = π / (π + γ): LUFFY's policy shaping of expert tokens (arXiv 2504.14945).

    The expert's own probability is taken as 1 (`mix_core_alg.py`, `p_div_p_0.1`).

    Args:
        logprobs: [N] nats, under the policy, differentiable.
        advantages: [N].
        gamma: γ > 0; smaller ones spread the gradient to unlikely tokens.
    """
    return -torch.sigmoid(logprobs - math.log(gamma)) * advantages  # π / (π + γ) without overflow


def sequence_mean(losses: Tensor, lengths: Tensor, num_rollouts: int) -> Tensor:
    """(1/R) Σ_i (1/|y_i|) Σ_t ℓ_t: GRPO (arXiv 2402.03300, eq. 3; TRL `grpo`, verl `seq-mean-token-mean`).

    Args:
        losses: [N].
        lengths: [R] int64.
        num_rollouts: R of the whole batch.
    """
    return sequence_means(losses, lengths).sum() / max(num_rollouts, 1)


def token_mean(losses: Tensor, num_tokens: int) -> Tensor:
    """Σ ℓ_t / Σ_i |y_i|: DAPO (arXiv 2503.14476, eq. 12; TRL `dapo`, verl `token-mean`).

    Args:
        losses: [N].
        num_tokens: N of the whole batch.
    """
    return losses.sum() / max(num_tokens, 1)


def fixed_length_mean(losses: Tensor, num_rollouts: int, norm_tokens: int) -> Tensor:
    """Σ ℓ_t / (R · L_max): Dr. GRPO (arXiv 2503.20783; TRL `dr_grpo`, verl `seq-mean-token-sum-norm`).

    LUFFY's `loss_remove_token_mean` divides each micro-batch by L_max alone; this is what it gives with one
    rollout in a micro-batch, and does not depend on how the batch is cut.

    Args:
        losses: [N].
        num_rollouts: R of the whole batch.
        norm_tokens: L_max.
    """
    return losses.sum() / (max(num_rollouts, 1) * norm_tokens)


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
