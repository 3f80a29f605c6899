"""What a completion's log-probs and entropies are, by teacher forcing in float64; and checks against it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
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


@torch.inference_mode()
def differences(
    model: PreTrainedModel, groups: Sequence[Group], temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Absolute differences of every token's log-prob (at temperature 1) and entropy from the model's own."""
    of_logprobs, of_entropies = [], []
    for group in groups:
        start, lengths = len(group.prompt_ids) - 1, [len(sample.completion_ids) for sample in group.samples]
        ids = torch.zeros(len(lengths), start + 1 + max(lengths), dtype=torch.long)
        for row, sample in zip(ids, group.samples, strict=True):  # padded on the right, where nothing looks
            whole = np.concatenate([group.prompt_ids, sample.completion_ids])
            row[: len(whole)] = torch.from_numpy(whole.astype(np.int64))
        logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - start).logits.double()
        for row, sample, length in zip(logits, group.samples, lengths, strict=True):
            raw = torch.log_softmax(row[:length], dim=-1)
            measured = raw if temperature == 1.0 else torch.log_softmax(row[:length] / temperature, dim=-1)
            chosen = raw[torch.arange(length), torch.from_numpy(sample.completion_ids.astype(np.int64))]
            entropies = -(measured.exp() * measured).sum(dim=-1)
            assert sample.logprobs is not None
            assert sample.entropies is not None
            of_logprobs.append(np.abs(sample.logprobs - chosen.numpy()))
            of_entropies.append(np.abs(sample.entropies - entropies.numpy()))
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
