"""What a completion's log-probs and entropies are, by teacher forcing in float64; and checks against it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from float64_reference import entropies, next_token_logprobs, sampled_tokens_logprobs
from transformers import PreTrainedModel

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.models import load_model
from pipeline.prompts import read_prompts
from pipeline.records import Group, Prompt

ARITH = Path(__file__).parents[3] / "data" / "arith"
ARITH_VOCABULARY = 100


def float64_model(folder: Path = ARITH / "model") -> PreTrainedModel:
    return load_model(folder, "cpu", "float32").double()


def arith_prompts(count: int) -> list[Prompt]:
    return read_prompts(str(ARITH / "prompts.jsonl"), count)


def requests_of(prompts: Iterable[Prompt], group_size: int, first_seed: int = 0) -> list[GroupRequest]:
    """Groups whose samples all have seeds of their own."""
    return [
        GroupRequest(prompt, tuple(first_seed + group_size * i + k for k in range(group_size)))
        for i, prompt in enumerate(prompts)
    ]


def differences(
    model: PreTrainedModel, groups: Sequence[Group], temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Absolute differences of every token's log-prob (at temperature 1) and entropy from the model's own."""
    of_logprobs, of_entropies = [], []
    for group in groups:
        for sample in group.samples:
            assert sample.logprobs is not None
            assert sample.entropies is not None
            ids = sample.completion_ids
            log_p = next_token_logprobs(model, group.prompt_ids, ids)
            tempered = log_p if temperature == 1.0 else torch.log_softmax(log_p / temperature, dim=-1)
            of_logprobs.append(np.abs(sample.logprobs - sampled_tokens_logprobs(log_p, ids)))
            of_entropies.append(np.abs(sample.entropies - entropies(tempered)))
    return np.concatenate(of_logprobs), np.concatenate(of_entropies)


def check_whole(
    groups: Sequence[Group],
    requests: Sequence[GroupRequest],
    sampling: SamplingConfig,
    vocabulary: int = ARITH_VOCABULARY,
) -> None:
    """Every group that was asked for, once, with as many numbers as tokens, each of them possible."""
    assert sorted(g.prompt.prompt_id for g in groups) == sorted(r.prompt.prompt_id for r in requests)
    seeds = {request.prompt.prompt_id: request.seeds for request in requests}
    for group in groups:
        assert tuple(sample.seed for sample in group.samples) == seeds[group.prompt.prompt_id]
        assert [sample.sample_index for sample in group.samples] == list(range(len(group.samples)))
        for sample in group.samples:
            assert sample.logprobs is not None
            assert sample.entropies is not None
            assert 1 <= len(sample.completion_ids) <= sampling.max_tokens
            assert len(sample.completion_ids) == len(sample.entropies) == len(sample.logprobs)
            assert ((sample.entropies >= 0) & (sample.entropies <= math.log(vocabulary) + 1e-5)).all()
            assert np.isfinite(sample.logprobs).all()
            assert (sample.logprobs <= 0).all()
            assert sample.finish_reason in ("stop", "length")


def ids_by_prompt(groups: Iterable[Group]) -> dict[str, list[list[int]]]:
    """The completions of each group; a group that comes twice fails here."""
    found: dict[str, list[list[int]]] = {}
    for group in groups:
        assert group.prompt.prompt_id not in found
        found[group.prompt.prompt_id] = [sample.completion_ids.tolist() for sample in group.samples]
    return found
