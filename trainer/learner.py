"""The two halves of the gradient: on-policy rollouts and EchoClips, each over its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.config import SamplingConfig, TrainConfig
from pipeline.logprobs import Row, completion_logprobs
from pipeline.records import Float32, Group, Judgement
from trainer import objectives
from trainer.advantages import REWARD_TOLERANCE, batch_advantages
from trainer.batches import micro_batches
from trainer.policy_loss import BatchCounts, PolicyTokens, needs_entropy_gradient, policy_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.shards import Clip

MAX_MEASURED_CLIPS = 256


@dataclass(frozen=True)
class RolloutBatch:
    """The R rollouts that a step learns from: those of whole groups, zero-advantage groups included unless
    the objective leaves them out (DAPO).

    Attributes:
        rows: R pairs of prompt ids and completion ids.
        advantages: [R] float32, on the CPU.
        old_logprobs: R arrays [T], what each token was sampled with; None where the engine cannot say, and
            the policy is taken as it is: ratio 1, right for the first update on fresh rollouts.
        max_tokens: what a completion may have at most, as sampled.
    """

    rows: list[Row]
    advantages: Tensor
    old_logprobs: list[Float32] | None
    max_tokens: int


@dataclass(frozen=True)
class RolloutPass:
    """Attributes: loss; entropy_mean (nats per completion token, at temperature 1; None without tokens);
    logprob_gap: greatest |log π − log π_old|, nats (None where π_old is not known)."""

    loss: float
    entropy_mean: float | None
    logprob_gap: float | None


def sampled_logprobs_known(logprobs_kind: str, sampling: SamplingConfig) -> bool:
    """Whether an engine's log-probs are those of the whole distribution at the sampling temperature."""
    truncated = sampling.top_p < 1 or sampling.top_k > 0
    return not truncated and (logprobs_kind == "processed" or sampling.temperature == 1)


def rollout_batch(
    groups: Sequence[Group],
    judgements: Sequence[Sequence[Judgement]],
    config: TrainConfig,
    *,
    logprobs_known: bool,
    max_tokens: int,
    reward_tolerance: float = REWARD_TOLERANCE,
) -> RolloutBatch:
    """The rollouts of every group that was judged in full; a group that lost one gives no gradient."""
    rows: list[Row] = []
    rewards: list[float] = []
    group_index: list[int] = []
    old: list[Float32 | None] = []
    for index, (group, judged) in enumerate(zip(groups, judgements, strict=True)):
        of_group = [judgement.reward for judgement in judged if judgement.reward is not None]
        if len(of_group) < config.group_size or len(group.samples) != len(of_group):
            continue
        rows += [(group.prompt_ids, sample.completion_ids) for sample in group.samples]
        old += [sample.logprobs for sample in group.samples]
        rewards += of_group
        group_index += [index] * len(of_group)
    advantages, kept = batch_advantages(
        config,
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(group_index, dtype=torch.int64),
        torch.tensor([len(completion) for _, completion in rows], dtype=torch.int64),
        max_tokens=max_tokens,
        tolerance=reward_tolerance,
    )
    chosen = kept.nonzero().flatten().tolist()
    known = [logprobs for i in chosen if (logprobs := old[i]) is not None]
    return RolloutBatch(
        rows=[rows[i] for i in chosen],
        advantages=advantages[kept],
        old_logprobs=known if logprobs_known and len(known) == len(chosen) else None,
        max_tokens=max_tokens,
    )


def backward_rollouts(
    model: PreTrainedModel,
    batch: RolloutBatch,
    config: TrainConfig,
    temperature: float,
    collect: Callable[[], None] | None = None,
) -> RolloutPass:
    """Add the gradient of the objective's loss to the model's parameters.

    With a correction the ratio is 1, and the engine's log-probs weigh the tokens instead of clipping them.

    Args:
        temperature: what the rollouts were sampled at; the loss is that of the tempered policy.
        collect: called after every backward pass.
    """
    device = model.device
    num_tokens = sum(len(completion) for _, completion in batch.rows)
    counts = BatchCounts(len(batch.rows), num_tokens, batch.max_tokens)
    loss, entropy, gap = 0.0, 0.0, 0.0
    for part in micro_batches([_tokens(row) for row in batch.rows], config.batch_tokens):
        stats = completion_logprobs(
            model,
            [batch.rows[i] for i in part],
            temperature=temperature,
            differentiable_entropies=needs_entropy_gradient(config),
        )
        old, sampled = stats.logprobs.detach(), None
        if batch.old_logprobs is not None:
            sampled = torch.as_tensor(np.concatenate([batch.old_logprobs[i] for i in part]), device=device)
            gap = max(gap, float((old - sampled).abs().max()) if len(old) else 0.0)
            old = sampled if config.correction == "none" else old
        tokens = PolicyTokens(
            stats.logprobs,
            old,
            stats.entropies,
            batch.advantages[part].to(device),
            stats.lengths,
            sampler_logprobs=sampled,
        )
        part_loss, _ = policy_loss(config, tokens, counts)
        if part_loss.requires_grad:
            torch.autograd.backward(part_loss)
        if collect:
            collect()
        loss += part_loss.item()
        entropy += float(stats.entropies.detach().sum())
    return RolloutPass(
        loss, entropy / num_tokens if num_tokens else None, gap if batch.old_logprobs is not None else None
    )


def backward_clips(
    model: PreTrainedModel,
    clips: Sequence[Clip],
    echo_weight: float,
    batch_tokens: int,
    collect: Callable[[], None] | None = None,
) -> tuple[float, list[float]]:
    """Add the gradient of λ × the EchoClip loss to the model's parameters.

    Args:
        echo_weight: λ; with 0 the losses are computed and no gradient.

    Returns:
        the EchoClip loss before λ, and each clip's mean negative log-likelihood, nats per token.
    """
    rows: list[Row] = [(clip.prompt_ids, clip.clip_ids) for clip in clips]
    per_clip = [0.0] * len(clips)
    loss = 0.0
    for part in micro_batches([_tokens(row) for row in rows], batch_tokens):
        with torch.set_grad_enabled(echo_weight > 0):
            stats = completion_logprobs(model, [rows[i] for i in part])
            losses = objectives.clip_losses(stats.logprobs, stats.lengths)
            weights = torch.tensor([clips[i].weight for i in part], device=losses.device)
            part_loss = objectives.echo_clip_loss(losses, weights, num_clips=len(clips))
        if part_loss.requires_grad:
            torch.autograd.backward(echo_weight * part_loss)
        if collect:
            collect()
        loss += part_loss.item()
        for i, value in zip(part, losses.tolist(), strict=True):
            per_clip[i] = value
    return loss, per_clip


def mean_clip_loss(model: PreTrainedModel, clips: Sequence[Clip], batch_tokens: int) -> float | None:
    """EchoClip loss over at most 256 clips, evenly spaced over the ranking; None without clips."""
    if not clips:
        return None
    spaced = clips[:: math.ceil(len(clips) / MAX_MEASURED_CLIPS)]
    return backward_clips(model, spaced, 0.0, batch_tokens)[0]


def _tokens(row: Row) -> int:
    return len(row[0]) + len(row[1])
