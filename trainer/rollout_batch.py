"""What a step learns from: the judged rollouts of whole groups, with what experts add to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.experts import Expert
from pipeline.logprobs import Row
from pipeline.records import Float32, Group, Int32, Judgement
from trainer.advantages import REWARD_TOLERANCE, batch_advantages


@dataclass(frozen=True)
class Rollouts:
    """One step's groups, G of them, as they were sampled and judged.

    Attributes:
        judgements: of each group, one per sample.
        experts: of each group, the expert solutions that join it (LUFFY).
        hint_tokens: of each group, how many of its prompt's last tokens are a hint (UFT).
        policy_version: of the weights that sampled.
        num_refills: batches of further prompts that dynamic sampling took.
    """

    groups: list[Group]
    judgements: list[Sequence[Judgement]]
    experts: list[Sequence[Expert]]
    hint_tokens: list[int]
    policy_version: int
    num_refills: int = 0


@dataclass(frozen=True)
class RolloutBatch:
    """The R rollouts that a step learns from: those of whole groups, zero-advantage groups included unless
    the objective leaves them out (DAPO).

    Attributes:
        rows: R pairs of prompt ids and completion ids; a hint is part of its completion.
        advantages: [R] float32, on the CPU.
        max_tokens: what a completion may have at most, as sampled.
        places: of each row, the indices of its group and its sample; −1 for an expert's.
        engine_logprobs: R arrays [T], what each token was sampled with, NaN where nobody sampled it; None
            where the engine cannot say.
        trainer_logprobs: R arrays [T], by the trainer, under the weights that sampled; None in the first
            update on a batch, which finds them out.
        is_expert: [R] bool; None without experts.
        hint_lengths: [R] int64, how many of each completion's first tokens are a hint; None without hints.
    """

    rows: list[Row]
    advantages: Tensor
    max_tokens: int
    places: list[tuple[int, int]]
    engine_logprobs: list[Float32] | None = None
    trainer_logprobs: list[Float32] | None = None
    is_expert: Tensor | None = None
    hint_lengths: Tensor | None = None


@dataclass
class _Columns:
    """The batch while it grows, one entry per rollout."""

    rows: list[Row] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[Float32 | None] = field(default_factory=list)
    is_expert: list[bool] = field(default_factory=list)
    hint_lengths: list[int] = field(default_factory=list)

    def add(
        self,
        place: tuple[int, int],
        prompt_ids: Int32,
        completion_ids: Int32,
        reward: float,
        logprobs: Float32 | None,
        hint_tokens: int = 0,
        *,
        is_expert: bool = False,
    ) -> None:
        prompt_tokens = len(prompt_ids) - hint_tokens
        hint_ids = prompt_ids[prompt_tokens:]
        self.rows.append((prompt_ids[:prompt_tokens], np.concatenate((hint_ids, completion_ids))))
        self.rewards.append(reward)
        self.places.append(place)
        if logprobs is not None and hint_tokens:
            logprobs = np.concatenate((np.full(hint_tokens, np.nan, dtype=np.float32), logprobs))
        self.logprobs.append(logprobs)
        self.is_expert.append(is_expert)
        self.hint_lengths.append(hint_tokens)


def rollout_batch(
    rollouts: Rollouts,
    config: TrainConfig,
    *,
    logprobs_known: bool,
    max_tokens: int,
    reward_tolerance: float = REWARD_TOLERANCE,
) -> RolloutBatch:
    """The rollouts of every group that was judged in full; a group that lost one gives no gradient.

    Args:
        logprobs_known: whether the engine's log-probs are those of the trained distribution.
    """
    columns = _Columns()
    for index, group in enumerate(rollouts.groups):
        rewards = _rewards(rollouts.judgements[index])
        if len(rewards) < config.group_size or len(group.samples) != len(rewards):
            continue
        hint_tokens = rollouts.hint_tokens[index]
        for sample, reward in zip(group.samples, rewards, strict=True):
            ids = group.prompt_ids, sample.completion_ids
            columns.add((index, sample.sample_index), *ids, reward, sample.logprobs, hint_tokens)
        for expert in rollouts.experts[index]:
            unsampled = np.full(len(expert.completion_ids), np.nan, dtype=np.float32)
            ids = group.prompt_ids, expert.completion_ids
            columns.add((index, -1), *ids, expert.reward, unsampled, is_expert=True)
    is_expert = torch.tensor(columns.is_expert, dtype=torch.bool)
    advantages, kept = batch_advantages(
        config,
        torch.tensor(columns.rewards, dtype=torch.float64),
        torch.tensor([group for group, _ in columns.places], dtype=torch.int64),
        torch.tensor([len(completion) for _, completion in columns.rows], dtype=torch.int64),
        max_tokens=max_tokens,
        tolerance=reward_tolerance,
        is_expert=is_expert if is_expert.any() else None,
    )
    chosen = kept.nonzero().flatten().tolist()
    logprobs = [known for i in chosen if (known := columns.logprobs[i]) is not None]
    hints = torch.tensor(columns.hint_lengths, dtype=torch.int64)[kept]
    return RolloutBatch(
        rows=[columns.rows[i] for i in chosen],
        advantages=advantages[kept],
        max_tokens=max_tokens,
        places=[columns.places[i] for i in chosen],
        engine_logprobs=logprobs if logprobs_known and len(logprobs) == len(chosen) else None,
        is_expert=is_expert[kept] if is_expert.any() else None,
        hint_lengths=hints if hints.any() else None,
    )


def carries_signal(judged: Sequence[Judgement], group_size: int, tolerance: float) -> bool:
    """Whether a group of `group_size` rollouts was judged in full, with unequal task rewards."""
    rewards = _rewards(judged)
    return len(rewards) == group_size and max(rewards) - min(rewards) > tolerance


def _rewards(judged: Sequence[Judgement]) -> list[float]:
    return [judgement.reward for judgement in judged if judgement.reward is not None]
