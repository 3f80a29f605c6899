"""UFT's hints: how much of an expert solution a prompt shows, less and less as training goes on."""

from __future__ import annotations

import math

import numpy as np

from pipeline.objective_config import UftConfig


def hint_probability(optim_step: int, options: UftConfig) -> float:
    """p(t) = p_end + ½ (p_start − p_end) (1 + cos(π t / T)) for t ≤ T, then 0.

    Source: UFT (arXiv 2505.16984; `verl/utils/dataset/rl_dataset.py` of its repository), with 0.95,
    0.05 and T = 300 steps.
    """
    if optim_step > options.hint_steps:
        return 0.0
    fraction = optim_step / max(options.hint_steps, 1)
    falling = options.hint_start - options.hint_end
    return options.hint_end + falling * (1 + math.cos(math.pi * fraction)) / 2


def draw_hint_tokens(
    solution_tokens: int, optim_step: int, options: UftConfig, rng: np.random.Generator
) -> int:
    """How many of a solution's first tokens the prompt shows: those of k of its N chunks.

    k ~ Binomial(N, p(t)) with N = min(`hint_chunks`, solution tokens), in chunks of equal length but for one
    token (UFT, as `hint_probability`).
    """
    chunks = min(options.hint_chunks, solution_tokens)
    if not chunks:
        return 0
    shown = int(rng.binomial(chunks, hint_probability(optim_step, options)))
    return solution_tokens * shown // chunks
