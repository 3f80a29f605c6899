"""The two halves of the gradient: on-policy rollouts and EchoClips, each over its micro-batches."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.logprobs import Row, TokenStats, completion_logprobs
from pipeline.records import Float32
from trainer import objectives
from trainer.batches import forward_batches
from trainer.policy_loss import BatchCounts, LossFigures, PolicyTokens, needs_entropy_gradient, policy_loss
from trainer.ranks import ALONE, Ranks
from trainer.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.shards import Clip

MAX_MEASURED_CLIPS = 256


@dataclass(frozen=True)
class RolloutPass:
    """What one pass over the rollouts gave.

    Attributes:
        figures: of all their tokens; None without rollouts.
        logprob_gap: greatest |log π − log π_engine|, nats; None where the engine does not say.
        logprobs: of each row, [T] nats, by the trainer.
        clip_losses: by row, the mean NLL of those clips that are prefixes of rollouts, nats per token.
    """

    loss: float
    figures: LossFigures | None
    logprob_gap: float | None
    logprobs: list[Float32]
    clip_losses: dict[int, float]


def backward_rollouts(
    model: PreTrainedModel,
    batch: RolloutBatch,
    config: TrainConfig,
    temperature: float,
    collect: Callable[[], None] | None = None,
    clip_tokens: Mapping[int, int] | None = None,
    clip_weight: float = 0.0,
    swap: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> RolloutPass:
    """Add the gradient of the objective's loss to the model's parameters.

    π_old is what the engine says, or, with a correction, which weighs the tokens by what the engine says,
    what the trainer found in its first update on the batch.

    Args:
        temperature: what the rollouts were sampled at; the loss is that of the tempered policy.
        collect: called after every backward pass.
        clip_tokens: by row, how many of its first completion tokens are an EchoClip.
        clip_weight: what each such clip's loss is multiplied by: λ over the step's clips.
        swap: called before and after what the clips' own backward passes collect; by default one pass gives
            the sum of both gradients.
        ranks: each process takes its share of the forward passes; all get what came of all.
    """
    clip_losses: dict[int, float] = {}
    counts, has_bonus = _counts(batch), needs_entropy_gradient(config)
    loss, gap, figures = 0.0, 0.0, None
    logprobs: list[Float32] = [np.zeros(0, dtype=np.float32)] * len(batch.rows)
    for part, is_mine in ranks.share(forward_batches(model, batch.rows, config.batch_tokens, ranks.size)):
        stats = completion_logprobs(
            model,
            [batch.rows[i] for i in part],
            temperature=temperature,
            # a bonus is of the policy that samples, as verl takes it
            entropy_temperature=temperature if has_bonus else 1.0,
            differentiable_entropies=has_bonus,
        )
        tokens = _policy_tokens(batch, part, stats, config)
        part_loss, part_figures = policy_loss(config, tokens, counts)
        echo = _prefix_losses(part, stats, clip_tokens or {})
        of_clips = clip_weight * sum(echo.values(), part_loss.new_zeros(()))
        if echo and swap:
            _backward(part_loss, collect, retain_graph=True)
            swap()
            _backward(of_clips, collect)
            swap()
        else:
            _backward((part_loss + of_clips) * (ranks.size * is_mine), collect)
        if not is_mine:
            continue
        loss += part_loss.item()
        clip_losses |= {row: of_clip.item() for row, of_clip in echo.items()}
        figures = part_figures if figures is None else figures + part_figures
        ours = stats.logprobs.detach()
        if tokens.sampler_logprobs is not None:
            gap = max(gap, _greatest_gap(ours, tokens.sampler_logprobs))
        ends = stats.lengths.cumsum(0).tolist()
        for i, of_row in zip(part, np.split(ours.cpu().numpy(), ends[:-1]), strict=True):
            logprobs[i] = of_row
    known_gap = None if batch.engine_logprobs is None else gap
    return _of_all(ranks, RolloutPass(loss, figures, known_gap, logprobs, clip_losses), batch)


def _of_all(ranks: Ranks, found: RolloutPass, batch: RolloutBatch) -> RolloutPass:
    """What every process found of its rows, put together."""
    if ranks.size == 1 or not batch.rows:
        return found
    lengths = [len(completion) for _, completion in batch.rows]
    known = [
        of_row if len(of_row) else np.zeros(length, dtype=np.float32)  # another process had the row
        for of_row, length in zip(found.logprobs, lengths, strict=True)
    ]
    logprobs = ranks.total(torch.from_numpy(np.concatenate(known))).numpy()
    figures = None if found.figures is None else found.figures.as_dict()
    said = (found.loss, figures, found.logprob_gap, list(found.clip_losses.items()))
    losses, all_figures, gaps, clip_losses = zip(*ranks.gathered(said), strict=True)
    told = [LossFigures.of(one, batch.advantages.device) for one in all_figures if one is not None]
    return RolloutPass(
        sum(losses),
        reduce(operator.add, told),
        None if found.logprob_gap is None else max(gaps),
        np.split(logprobs, np.cumsum(lengths)[:-1]),
        {row: value for of_rank in clip_losses for row, value in of_rank},
    )


def _backward(loss: Tensor, collect: Callable[[], None] | None, *, retain_graph: bool = False) -> None:
    if loss.requires_grad:
        torch.autograd.backward(loss, retain_graph=retain_graph)
    if collect:
        collect()


def _prefix_losses(
    part: Sequence[int], stats: TokenStats, clip_tokens: Mapping[int, int]
) -> dict[int, Tensor]:
    """By row of `part`, the mean NLL of its completion's first tokens, where those are a clip."""
    rows = dict(zip(part, stats.logprobs.split(stats.lengths.tolist()), strict=True))  # type: ignore[no-untyped-call]
    return {row: -rows[row][: clip_tokens[row]].mean() for row in part if row in clip_tokens}


def _policy_tokens(
    batch: RolloutBatch, part: Sequence[int], stats: TokenStats, config: TrainConfig
) -> PolicyTokens:
    device = stats.logprobs.device
    engine, trainer = (
        None if known is None else torch.as_tensor(np.concatenate([known[i] for i in part]), device=device)
        for known in (batch.engine_logprobs, batch.trainer_logprobs)
    )
    old = stats.logprobs.detach() if trainer is None else trainer
    if engine is not None and config.correction == "none":
        old = engine
    return PolicyTokens(
        stats.logprobs,
        old,
        stats.entropies,
        batch.advantages[part].to(device),
        stats.lengths,
        sampler_logprobs=engine,
        is_expert=None if batch.is_expert is None else batch.is_expert[part].to(device),
        hint_lengths=None if batch.hint_lengths is None else batch.hint_lengths[part].to(device),
    )


def _counts(batch: RolloutBatch) -> BatchCounts:
    num_tokens = sum(len(completion) for _, completion in batch.rows)
    num_hint_tokens = 0 if batch.hint_lengths is None else int(batch.hint_lengths.sum())
    return BatchCounts(len(batch.rows), num_tokens - num_hint_tokens, batch.max_tokens, num_hint_tokens)


def _greatest_gap(ours: Tensor, engine: Tensor) -> float:
    gaps = (ours - engine)[~engine.isnan()].abs()  # nobody sampled experts' and hints' tokens
    return float(gaps.max()) if len(gaps) else 0.0


def backward_clips(
    model: PreTrainedModel,
    clips: Sequence[Clip],
    echo_weight: float,
    batch_tokens: int,
    collect: Callable[[], None] | None = None,
    num_clips: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[float, list[float]]:
    """Add the gradient of λ × the EchoClip loss to the model's parameters.

    Args:
        echo_weight: λ; with 0 the losses are computed and no gradient.
        num_clips: what the sum over the clips is divided by; by default how many they are.
        ranks: see `backward_rollouts`.

    Returns:
        the EchoClip loss before λ, and each clip's mean negative log-likelihood, nats per token.
    """
    rows: list[Row] = [(clip.prompt_ids, clip.clip_ids) for clip in clips]
    per_clip = [0.0] * len(clips)
    loss = 0.0
    for part, is_mine in ranks.share(forward_batches(model, rows, batch_tokens, ranks.size)):
        with torch.set_grad_enabled(echo_weight > 0):
            stats = completion_logprobs(model, [rows[i] for i in part])
            losses = objectives.clip_losses(stats.logprobs, stats.lengths)
            weights = torch.tensor([clips[i].weight for i in part], device=losses.device)
            part_loss = objectives.echo_clip_loss(losses, weights, num_clips=num_clips or len(clips))
        _backward(echo_weight * part_loss * (ranks.size * is_mine), collect)
        if not is_mine:
            continue
        loss += part_loss.item()
        for i, value in zip(part, losses.tolist(), strict=True):
            per_clip[i] = value
    if rows:
        loss, *per_clip = ranks.total(torch.tensor([loss, *per_clip], dtype=torch.float64)).tolist()
    return loss, per_clip


def mean_clip_loss(model: PreTrainedModel, clips: Sequence[Clip], batch_tokens: int) -> float | None:
    """EchoClip loss over at most 256 clips, evenly spaced over the ranking; None without clips."""
    if not clips:
        return None
    spaced = clips[:: math.ceil(len(clips) / MAX_MEASURED_CLIPS)]
    return backward_clips(model, spaced, 0.0, batch_tokens)[0]
