"""Weights against the mismatch between engine and trainer: w = π_trainer / π_engine, detached.

An engine samples with other kernels and precisions than the trainer computes with, so even fresh rollouts
are slightly off-policy. Each token's loss is multiplied by its weight (TRL `grpo_trainer.py`,
`vllm_importance_sampling_mode`; verl `rollout_corr_helper.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objective_config import ObjectiveConfig


@torch.no_grad()
def correction_weights(
    config: ObjectiveConfig, old_logprobs: Tensor, sampler_logprobs: Tensor, lengths: Tensor
) -> Tensor:
    """The configured correction's weight of each token, 1 without one.

    Args:
        old_logprobs: [N] nats, by the trainer, under the weights that sampled.
        sampler_logprobs: [N] nats, by the engine, of the same distribution.
        lengths: [R] int64, summing to N.

    Returns:
        [N], detached.
    """
    low, high = config.correction_floor, config.correction_cap
    if config.correction == "truncated":
        return truncated_weights(old_logprobs, sampler_logprobs, low, high)
    if config.correction == "token_mask":
        return token_mask_weights(old_logprobs, sampler_logprobs, low, high)
    if config.correction == "sequence_mask":
        return sequence_mask_weights(old_logprobs, sampler_logprobs, lengths, low, high)
    return torch.ones_like(old_logprobs)


@torch.no_grad()
def truncated_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, low: float, high: float) -> Tensor:
    """[N] min(w_t, high), and at least `low`: truncated importance sampling per token.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training";
    TRL `token_truncate`, verl `rollout_is: token`.

    Args:
        old_logprobs: [N].
        sampler_logprobs: [N].
    """
    return (old_logprobs - sampler_logprobs).exp().clamp(low, high)


@torch.no_grad()
def token_mask_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, low: float, high: float) -> Tensor:
    """[N] w_t, and 0 where it lies outside [low, high] (IcePop, arXiv 2510.18855; TRL `token_mask`).

    Args:
        old_logprobs: [N].
        sampler_logprobs: [N].
    """
    return _masked((old_logprobs - sampler_logprobs).exp(), low, high)


@torch.no_grad()
def sequence_mask_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, lengths: Tensor, low: float, high: float
) -> Tensor:
    """[N] Π_t w_t of each token's sequence, and 0 where it lies outside [low, high].

    Masked importance sampling, which drops whole rollouts (TRL `sequence_mask`, its default with high 3).

    Args:
        old_logprobs: [N].
        sampler_logprobs: [N].
        lengths: [R] int64, summing to N.
    """
    if not len(lengths):
        return torch.ones_like(old_logprobs)
    log_ratios = torch.segment_reduce(old_logprobs - sampler_logprobs, "sum", lengths=lengths)
    return _masked(log_ratios.exp(), low, high).repeat_interleave(lengths)


@torch.no_grad()
def mismatch_kl(logprobs: Tensor, sampler_logprobs: Tensor) -> Tensor:
    """[N] w_t − 1 − log w_t, whose mean over sampled tokens estimates KL(engine ‖ trainer), nats.

    Source: Schulman 2020, "Approximating KL divergence", the estimator k3: never negative.

    Args:
        logprobs: [N] by the trainer.
        sampler_logprobs: [N] by the engine.
    """
    log_ratios = logprobs - sampler_logprobs
    return torch.expm1(log_ratios) - log_ratios


def _masked(ratios: Tensor, low: float, high: float) -> Tensor:
    return ratios.masked_fill((ratios < low) | (ratios > high), 0.0)
