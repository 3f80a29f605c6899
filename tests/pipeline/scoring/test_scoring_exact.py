"""The scorer's numbers against those of the same model in float64, one sequence at a time, no tricks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.transformers import TransformersEngine
from pipeline.logprobs import Row, completion_logprobs
from pipeline.models import load_model, model_folder
from pipeline.prompts import read_prompts
from pipeline.tokenization import load_tokenizer

PROJECT = Path(__file__).resolve().parents[3]


def arith_rollouts() -> list[Row]:
    """Rollouts of the embedded model, by itself."""
    folder = model_folder("arith")
    prompts = [prompt for prompt, _ in zip(read_prompts("arith", None), range(32), strict=False)]
    engine = TransformersEngine(load_model(folder, "cpu", "float32"), load_tokenizer(folder))
    requests = [GroupRequest(prompt, tuple(range(4))) for prompt in prompts]
    groups = engine.generate(requests, SamplingConfig(group_size=4, max_tokens=64))
    return [(group.prompt_ids, sample.completion_ids) for group in groups for sample in group.samples]


def texts(model: str) -> list[Row]:
    """Our own pages in pieces of mixed lengths, as if they had been sampled."""
    tokenizer, random = load_tokenizer(model_folder(model)), np.random.default_rng(0)
    text = "".join(page.read_text() for page in sorted((PROJECT / "docs").glob("*.md")))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    rows, at = [], 0
    while at < len(ids) and sum(len(completion) for _, completion in rows) < 2200:
        prompt, completion = random.integers(5, 60), int(random.lognormal(4, 0.8)) + 1
        rows.append((ids[at : at + prompt], ids[at + prompt : at + prompt + completion]))
        at += prompt + completion
    return rows


@torch.inference_mode()
def reference(name: str, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N] by a full log-softmax of each sequence alone, in float64."""
    model = load_model(model_folder(name), "cpu", "float32").double()
    logprobs, entropies = [], []
    for prompt, completion in rows:
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        log_p = torch.log_softmax(model(ids[None]).logits[0, len(prompt) - 1 : -1], dim=-1)
        logprobs.append(log_p.gather(1, ids[len(prompt) :, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(dim=-1))
    return torch.cat(logprobs), torch.cat(entropies)


@torch.inference_mode()
def scorer(name: str, rows: list[Row], dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = load_model(model_folder(name), "cpu", dtype)
    rows_per_pass = 16
    passes = [
        completion_logprobs(model, rows[start : start + rows_per_pass], precise=True)
        for start in range(0, len(rows), rows_per_pass)
    ]
    return torch.cat([stats.logprobs for stats in passes]), torch.cat([stats.entropies for stats in passes])


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("arith", arith_rollouts, id="arith"),
        pytest.param("smollm2", lambda: texts("smollm2"), id="smollm2", marks=pytest.mark.slow),
    ],
)
def test_every_token_of_two_thousand_is_as_in_float64(name, rows):
    rows = rows()
    expected = reference(name, rows)
    assert len(expected[0]) >= 2000
    for found, exact in zip(scorer(name, rows, "float32"), expected, strict=True):
        assert (found - exact).abs().max() <= 1e-4
    for found, exact in zip(scorer(name, rows, "bfloat16"), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().mean() <= 0.03
