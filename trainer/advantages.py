"""Rewards to advantages, and which groups carry a signal. B rollouts in groups, in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objective_config import DapoConfig, LuffyConfig, ObjectiveConfig

REWARD_TOLERANCE = 1e-6
ADVANTAGE_EPSILON = 1e-6
OVERLONG_SHARE = 5  # the paper's buffer of 4,096 tokens is a fifth of its 20,480


def batch_advantages(
    config: ObjectiveConfig,
    task_rewards: Tensor,
    group_index: Tensor,
    lengths: Tensor,
    *,
    max_tokens: int,
    tolerance: float = REWARD_TOLERANCE,
    is_expert: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The advantages that the configured objective takes, and which rollouts it learns from.

    Args:
        task_rewards: [B], as the verifier gave them.
        group_index: [B] int64, which group each rollout is of.
        lengths: [B] int64, completion tokens.
        max_tokens: completion tokens at most, as sampled.
        tolerance: rewards this close are equal.
        is_expert: [B] bool, for LUFFY: which rollouts are an expert's.

    Returns:
        advantages [B] float32; kept [B] bool: false for those that DAPO's dynamic sampling leaves out, which
        are to be replaced by other groups' and count in no mean.
    """
    options = config.options
    kept = torch.ones(len(task_rewards), dtype=torch.bool, device=task_rewards.device)
    rewards, counted = task_rewards, None
    if isinstance(options, DapoConfig):
        if options.dynamic_sampling:
            kept = has_signal(task_rewards, group_index, tolerance)
        buffer = _buffer(options, max_tokens)
        rewards = task_rewards - options.overlong_penalty * overlong_share(lengths, max_tokens, buffer)
    if isinstance(options, LuffyConfig) and is_expert is not None and not options.experts_in_statistics:
        counted = ~is_expert
    advantages = group_advantages(
        rewards,
        group_index,
        options.scale_rewards,
        tolerance,
        epsilon=options.advantage_epsilon,
        counted=counted,
    )
    return advantages * kept, kept


def group_advantages(
    rewards: Tensor,
    group_index: Tensor,
    scale: bool,
    tolerance: float = REWARD_TOLERANCE,
    *,
    epsilon: float = ADVANTAGE_EPSILON,
    counted: Tensor | None = None,
) -> Tensor:
    """Reward − group mean, divided by the group's deviation + ε if `scale`.

    A group whose rewards spread by no more than `tolerance` gets exact zeros. Its deviation cannot tell:
    the mean of eight times 0.7 is not 0.7 in floating point, and noise over noise is of order 1.

    Args:
        rewards: [B].
        group_index: [B] int64, which group each rollout is of.
        scale: GRPO (arXiv 2402.03300, eq. 3: deviation with ddof 1) if true, Dr. GRPO (arXiv 2503.20783) if
            false.
        epsilon: 1e-6 as verl has it (`compute_grpo_outcome_advantage`), 1e-4 in TRL.
        counted: [B] bool, whose rewards make the group's mean and deviation; by default all. Without LUFFY's
            experts it is `grpo_split` of its repository (`mix_core_alg.py`), which divides by 1 where the
            counted rewards are all equal.

    Returns:
        [B] float32.
    """
    exact = rewards.to(torch.float64)
    advantages = torch.zeros_like(exact)
    for group in torch.unique(group_index):
        members = group_index == group
        statistics = exact[members if counted is None else members & counted]
        if not len(statistics) or _spread(exact[members]) <= tolerance:
            continue
        divided = scale and _spread(statistics) > tolerance
        deviation = statistics.std(correction=1) + epsilon if divided else 1.0
        advantages[members] = (exact[members] - statistics.mean()) / deviation
    return advantages.to(torch.float32)


def has_signal(task_rewards: Tensor, group_index: Tensor, tolerance: float = REWARD_TOLERANCE) -> Tensor:
    """[B] bool: whether a rollout's group has unequal task rewards (DAPO, arXiv 2503.14476, eq. 11).

    Of the *task* rewards, because overlong shaping makes a group of successes unequal and would keep it;
    verl takes the reward that `filter_groups.metric` names, NeMo the unshaped one.

    Args:
        task_rewards: [B].
        group_index: [B] int64.
    """
    kept = torch.zeros(len(task_rewards), dtype=torch.bool, device=task_rewards.device)
    for group in torch.unique(group_index):
        members = group_index == group
        kept[members] = bool(_spread(task_rewards[members].to(torch.float64)) > tolerance)
    return kept


def overlong_share(lengths: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """How far into the last `buffer_tokens` of `max_tokens` each completion reaches: 0 before, 1 at the end.

    Its negative, times the penalty, is DAPO's soft overlong punishment: min(0, −(|y| − (L_max − L_buffer)) /
    L_buffer) (arXiv 2503.14476, eq. 13; verl `workers/reward_manager/dapo.py`).

    Args:
        lengths: [B] int64, completion tokens.
        buffer_tokens: 0 for none.

    Returns:
        [B] float64.
    """
    over = (lengths - (max_tokens - buffer_tokens)).clamp_min(0).to(torch.float64)
    return over / buffer_tokens if buffer_tokens else torch.zeros_like(over)


def _buffer(options: DapoConfig, max_tokens: int) -> int:
    if options.overlong_buffer_tokens is None:
        return max_tokens // OVERLONG_SHARE
    return options.overlong_buffer_tokens


def _spread(rewards: Tensor) -> Tensor:
    return rewards.max() - rewards.min() if len(rewards) else rewards.new_zeros(())
