"""What a training reports: one JSON line per optimizer step, and what came of the whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import MiningConfig
from pipeline.records import Judgement

CLASSES = ("all_success", "all_fail", "all_equal", "mixed", "incomplete")


@dataclass(frozen=True)
class TrainingResult:
    """What a training did.

    Attributes:
        echo_loss_before, echo_loss_after: mean EchoClip loss over the same (up to 256) clips, nats per
            token; None without clips.
        reward_before, reward_after: mean reward of the first and the last step's rollouts; None without any.
        num_rollouts: on-policy rollouts sampled.
        num_skipped: steps whose loss or gradient was not finite.
        checkpoint: the trained model's folder.
    """

    training_id: str
    optim_steps: int
    echo_loss_before: float | None
    echo_loss_after: float | None
    reward_before: float | None
    reward_after: float | None
    num_rollouts: int
    num_clip_uses: int
    num_skipped: int
    checkpoint: Path


@dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.jsonl`, explained in docs/training.md; None is what a step does not have.

    Attributes:
        policy_version: of the weights that sampled.
        policy_lag: optimizer steps taken since, before this one.
        classes: share of the step's groups in each class.
        zero_advantage_share: share of the groups with equal rewards, whose advantages are all 0.
        echo_loss: before λ; None without clips.
        loss, rl_loss, echo_loss, grad_norm: None where they are not finite, and the step was skipped.
        echo_weight: λ of this step.
        grad_norm: before clipping; rl_grad_norm and echo_grad_norm are those of its two terms, None where one
            pass over the rollouts gave both and `grad_norms_every` did not ask for them.
        clip_share: share of the tokens whose ratio the objective clips.
        ratio_mean: of π / π_old over the tokens.
        mismatch_kl: estimated KL(engine ‖ trainer), nats per token.
        entropy_mean: nats per completion token.
        logprob_gap: greatest difference between the engine's log-probs and ours, nats.
        num_refills: batches of prompts that DAPO's dynamic sampling took beyond the first.
        num_expert_tokens: of LUFFY's expert rollouts in the batch.
        num_hint_tokens: of UFT's hints in the batch, once per rollout.
        clip_lag_mean, clip_lag_max: optimizer steps since the policies that sampled the clips.
        padding_share: share of the positions read in the update's forward passes that nothing needed.
    """

    optim_step: int
    policy_version: int
    policy_lag: int
    skipped: bool
    reward_mean: float | None
    classes: dict[str, float]
    zero_advantage_share: float | None
    rl_loss: float | None
    echo_loss: float | None
    echo_weight: float
    loss: float | None
    grad_norm: float | None
    rl_grad_norm: float | None
    echo_grad_norm: float | None
    clip_share: float | None
    ratio_mean: float | None
    mismatch_kl: float | None
    entropy_mean: float | None
    logprob_gap: float | None
    num_groups: int
    num_refills: int
    num_completion_tokens: int
    num_expert_tokens: int
    num_hint_tokens: int
    num_clips: int
    num_retired_clips: int
    num_clip_tokens: int
    clip_lag_mean: float | None
    clip_lag_max: int | None
    padding_share: float | None
    seconds: float
    tokens_per_second: float


def group_class(rewards: Sequence[float], group_size: int, rules: MiningConfig) -> str:
    """The class of a group in this batch, by the rules that the lake is mined with.

    The SQL in `sql/mining` classes what lies in the lake; the same golden cases hold for both.
    """
    too_few = len(rewards) < rules.min_group_size
    if too_few or (len(rewards) < group_size and not rules.allow_partial):
        return "incomplete"
    low, high, tolerance = min(rewards), max(rewards), rules.reward_tolerance
    if high - low > tolerance:
        return "mixed"
    if low >= rules.success_reward - tolerance:
        return "all_success"
    return "all_fail" if high <= rules.fail_reward + tolerance else "all_equal"


def class_shares(
    judgements: Sequence[Sequence[Judgement]], group_size: int, rules: MiningConfig
) -> dict[str, float]:
    """Share of the groups in each class; empty without groups."""
    if not judgements:
        return {}
    counts = Counter(
        group_class([j.reward for j in judged if j.reward is not None], group_size, rules)
        for judged in judgements
    )
    return {name: counts[name] / len(judgements) for name in CLASSES}


def reward_mean(judgements: Sequence[Sequence[Judgement]]) -> float | None:
    rewards = [j.reward for judged in judgements for j in judged if j.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def finite(value: float | None) -> float | None:
    """The value, or None where JSON could not say it."""
    return value if value is not None and math.isfinite(value) else None
