"""A step's line of `metrics.jsonl`, out of what was sampled and what came of learning from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config import MiningConfig, TrainConfig
from trainer.metrics import StepMetrics, class_shares, finite, reward_mean
from trainer.rollout_batch import RolloutBatch, Rollouts
from trainer.update import Update

if TYPE_CHECKING:
    from pipeline.shards import Clip

TOKEN_FIGURES = ("clip_share", "ratio_mean", "mismatch_kl", "entropy_mean")


def step_metrics(
    rollouts: Rollouts,
    batch: RolloutBatch,
    clips: Sequence[Clip],
    update: Update,
    config: TrainConfig,
    rules: MiningConfig,
    *,
    optim_step: int,
    policy_version: int,
    started: float,
    num_retired: int,
) -> StepMetrics:
    """
    Args:
        policy_version: of the weights before this step's update.
        started: `time.perf_counter()` when the step began.
        num_retired: clips of the shards that are no longer due after this step.
    """
    seconds = time.perf_counter() - started
    classes = class_shares(rollouts.judgements, config.group_size, rules)
    groups, figures, losses = rollouts.groups, update.rl.figures, update.losses
    of_tokens = {name: finite(getattr(figures, name)) if figures else None for name in TOKEN_FIGURES}
    num_completion_tokens = sum(len(sample.completion_ids) for group in groups for sample in group.samples)
    num_clip_tokens = sum(len(clip.clip_ids) for clip in clips)
    clip_lags = [policy_version - clip.policy_version for clip in clips]
    return StepMetrics(
        optim_step=optim_step,
        policy_version=rollouts.policy_version,
        policy_lag=policy_version - rollouts.policy_version,
        skipped=update.skipped,
        reward_mean=finite(reward_mean(rollouts.judgements)),
        classes=classes,
        zero_advantage_share=1 - classes["mixed"] - classes["incomplete"] if classes else None,
        rl_loss=finite(losses["rl_loss"]),
        echo_loss=finite(losses["echo_loss"]) if clips else None,
        echo_weight=update.echo_weight,
        loss=finite(losses["loss"]),
        grad_norm=finite(losses["grad_norm"]),
        rl_grad_norm=finite(losses.get("rl_grad_norm")) if groups else None,
        echo_grad_norm=finite(losses.get("echo_grad_norm")) if clips else None,
        **of_tokens,
        logprob_gap=finite(update.rl.logprob_gap) if figures else None,
        num_groups=len(groups),
        num_refills=rollouts.num_refills,
        num_completion_tokens=num_completion_tokens,
        num_expert_tokens=_num_expert_tokens(batch),
        num_hint_tokens=0 if batch.hint_lengths is None else int(batch.hint_lengths.sum()),
        num_clips=len(clips),
        num_retired_clips=num_retired,
        num_clip_tokens=num_clip_tokens,
        clip_lag_mean=sum(clip_lags) / len(clip_lags) if clip_lags else None,
        clip_lag_max=max(clip_lags, default=None),
        padding_share=update.padding_share,
        seconds=seconds,
        tokens_per_second=(num_completion_tokens + num_clip_tokens) / seconds,
    )


def _num_expert_tokens(batch: RolloutBatch) -> int:
    if batch.is_expert is None:
        return 0
    return sum(
        len(row[1]) for row, is_expert in zip(batch.rows, batch.is_expert.tolist(), strict=True) if is_expert
    )
