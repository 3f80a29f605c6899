"""How trainers tell groups without signal from the rest, and what advantages they give: one function a rule.

Each is the rule of one trainer as its code computes it, in the same precision (float32 unless it says
otherwise) and with the same degrees of freedom, on one group's rewards. Read in the repositories in the
summer of 2026; TRL at 1.16.0. GPUs may add in another order than the CPU does here, so that on them other
groups are missed, about as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Rewards: TypeAlias = NDArray[np.float64]  # [G], G ≥ 2
Advantages: TypeAlias = NDArray[np.float64]  # [G]


@dataclass(frozen=True)
class Rule:
    """One trainer's test for signal, beside its normalization.

    Attributes:
        test: when a group has signal, in a few words.
        source: the file it was read in.
        keeps: [G] rewards → whether the trainer takes the group for one with signal.
        advantages: [G] rewards → [G] what the trainer would make of them; None if that was not read.
        normalization: the same in a few words.
    """

    trainer: str
    test: str
    source: str
    keeps: Callable[[Rewards], bool]
    advantages: Callable[[Rewards], Advantages] | None = None
    normalization: str = ""


def numpy_std_keeps(rewards: Rewards) -> bool:
    """verl's DAPO filter and Trinity's filter at its default threshold: float64, ddof 0."""
    return bool(np.std(rewards) != 0.0)


def verl_advantages(rewards: Rewards) -> Advantages:
    """`compute_grpo_outcome_advantage` in verl/trainer/ppo/core_algos.py: ddof 1, ε 1e-6."""
    scores = _float32(rewards)
    return _float64((scores - torch.mean(scores)) / (torch.std(scores) + 1e-6))


def trl_std(rewards: Rewards) -> torch.Tensor:
    """`nanstd` in trl/trainer/utils.py: ddof 1 by a factor behind the mean of squares. Returns [1]."""
    grouped = _float32(rewards).view(1, -1)
    size = grouped.shape[1]
    mean = torch.nanmean(grouped, dim=1, keepdim=True)
    variance = torch.nanmean((grouped - mean) ** 2, dim=1) * torch.tensor(size / (size - 1))
    return torch.sqrt(variance)


def trl_metric_keeps(rewards: Rewards) -> bool:
    """`frac_reward_zero_std`: isclose with its default absolute tolerance of 1e-8."""
    std = trl_std(rewards)
    return not bool(torch.isclose(std, torch.zeros_like(std)))


def trl_replay_keeps(rewards: Rewards) -> bool:
    return bool(trl_std(rewards) > 0)


def trl_advantages(rewards: Rewards) -> Advantages:
    """`_generate_and_score_completions` in trl/trainer/grpo_trainer.py: ddof 1, ε 1e-4."""
    scores = _float32(rewards)
    mean = torch.nanmean(scores.view(1, -1), dim=1)
    return _float64((scores - mean) / (trl_std(rewards) + 1e-4))


def prime_rl_advantages(rewards: Rewards) -> Advantages:
    """Reward minus the group's mean; never divided."""
    scores = _float32(rewards)
    return _float64(scores - scores.mean())


def prime_rl_keeps(rewards: Rewards) -> bool:
    """A token stays in the RL component unless its advantage is exactly 0."""
    return bool((prime_rl_advantages(rewards) != 0.0).any())


def openrlhf_keeps(rewards: Rewards) -> bool:
    """`--dynamic_filtering_reward_range 0 1`: the mean of the float32 scores, added in float64."""
    scores: list[float] = _float64(_float32(rewards)).tolist()
    return 0.0 < sum(scores) / len(scores) < 1.0


def openrlhf_advantages(rewards: Rewards) -> Advantages:
    """`group_norm` in openrlhf/trainer/ppo_utils/experience_maker.py: ddof 1, ε 1e-9."""
    scores = _float32(rewards).view(1, -1)
    normalized = (scores - scores.mean(-1, keepdim=True)) / (scores.std(-1, keepdim=True) + 1e-9)
    return _float64(normalized[0])


def nemo_baseline_and_std(rewards: Rewards) -> tuple[torch.Tensor, torch.Tensor]:
    """`calculate_baseline_and_std_per_prompt` in nemo_rl/algorithms/utils.py: leave one out, E[x²] − E[x]².

    Returns:
        [G] and [G], one for each sample. With G = 2 every deviation is 0: 0 · ∞ is NaN, which becomes 0.
    """
    scores = _float32(rewards)
    others = 1 - torch.eye(len(scores))
    num_others = torch.tensor(len(scores) - 1.0)
    baseline = torch.matmul(others, scores) / num_others
    mean_square = torch.matmul(others, scores.pow(2)) / num_others
    variance = (mean_square - baseline.square()) * (num_others / (num_others - 1))
    return baseline, variance.sqrt().nan_to_num(0)


def nemo_keeps(rewards: Rewards) -> bool:
    """Dynamic sampling keeps the samples whose deviation is not 0; a group with one such sample is kept."""
    _, std = nemo_baseline_and_std(rewards)
    return bool((std != 0.0).any())


def nemo_advantages(rewards: Rewards) -> Advantages:
    """`GRPOAdvantageEstimator`: divided, with ε 1e-6, only where the deviation is above 0."""
    baseline, std = nemo_baseline_and_std(rewards)
    advantages = _float32(rewards) - baseline
    return _float64(torch.where(std > 0, advantages / (std + 1e-6), advantages))


def slime_keeps(rewards: Rewards) -> bool:
    """float64, ddof 1."""
    return bool(torch.tensor(rewards, dtype=torch.float64).std() > 1e-6)


def skyrl_keeps(rewards: Rewards) -> bool:
    return bool(rewards.max() - rewards.min() > 1e-6)


def _float32(rewards: Rewards) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float32)


def _float64(values: torch.Tensor) -> NDArray[np.float64]:
    return values.double().numpy()


RULES = (
    Rule(
        "verl",
        "np.std ≠ 0",
        "verl/trainer/ppo/v1/replay_buffer.py, _dapo_filtered_keys",
        numpy_std_keeps,
        verl_advantages,
        "(r − mean) / (std + 1e-6)",
    ),
    Rule(
        "TRL, metric",
        "std not close to 0 (1e-8)",
        "trl/trainer/grpo_trainer.py, is_std_zero",
        trl_metric_keeps,
        trl_advantages,
        "(r − mean) / (std + 1e-4)",
    ),
    Rule(
        "TRL, replay buffer",
        "std > 0",
        "trl, grpo_with_replay_buffer_trainer.py",
        trl_replay_keeps,
        trl_advantages,
        "(r − mean) / (std + 1e-4)",
    ),
    Rule(
        "prime-rl",
        "an advantage ≠ 0",
        "prime_rl/orchestrator/train_sink.py, _prune_zero_advantages; the gate [0, 0]",
        prime_rl_keeps,
        prime_rl_advantages,
        "r − mean",
    ),
    Rule(
        "OpenRLHF",
        "0 < mean < 1",
        "openrlhf/trainer/ppo_utils, dynamic_filtering_reward_range 0 1",
        openrlhf_keeps,
        openrlhf_advantages,
        "(r − mean) / (std + 1e-9)",
    ),
    Rule(
        "NeMo-RL",
        "std ≠ 0, std from E[x²] − E[x]²",
        "nemo_rl/algorithms/grpo.py, non_zero_std_mask",
        nemo_keeps,
        nemo_advantages,
        "(r − mean of the others) / (std + 1e-6)",
    ),
    Rule(
        "Trinity",
        "np.std > 0",
        "trinity/buffer/operators/filters/reward_filter.py, threshold 0.0",
        numpy_std_keeps,
    ),
    Rule(
        "slime",
        "std > 1e-6",
        "slime/rollout/filter_hub/dynamic_sampling_filters.py",
        slime_keeps,
    ),
    Rule(
        "SkyRL",
        "max − min > 1e-6",
        "skyrl/train/utils/trainer_utils.py",
        skyrl_keeps,
    ),
)
