"""The embedded model, rollouts that it sampled, and a lake to put them into."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_helpers import rows_of
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import EngineConfig, SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.transformers import TransformersEngine
from pipeline.imports.core import import_rollouts, with_formats
from pipeline.lake import Lake
from pipeline.models import load_model, model_folder, policy_of
from pipeline.records import Prompt
from pipeline.tokenization import load_tokenizer

MODEL = model_folder("arith")
QUESTIONS = ("46*3+14", "13*3-26", "24*9+49+23+34-8")


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="session")
def model():
    return load_model(MODEL, "cpu", "float32")


@pytest.fixture(scope="session")
def policy(tokenizer):
    return policy_of(MODEL, "arith", tokenizer)


@pytest.fixture(scope="session")
def newer(model, policy):
    """The policy after more training: its weights are a little different."""
    other = load_model(MODEL, "cpu", "float32")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    return other, replace(policy, weights_hash="of the newer weights", policy_version=8)


@pytest.fixture(scope="session")
def sampled(model, tokenizer) -> list[dict[str, Any]]:
    """Rows of three groups as the engine samples them, with its entropies; all rewards are 1."""
    engine = TransformersEngine(model, tokenizer, EngineConfig().entropy_kind)
    requests = [GroupRequest(Prompt(({"role": "user", "content": text},)), (1, 2)) for text in QUESTIONS]
    return rows_of(engine.generate(requests, SamplingConfig(group_size=2, max_tokens=48)))


@pytest.fixture
def hungry():
    """A model of one layer so wide that a token takes megabytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 2**17, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()


@pytest.fixture
def put(lake: Lake, tmp_path: Path, tokenizer: Any):
    """Imports rows into the test's lake; they are the embedded model's unless another tokenizer is given."""

    def put(rows: list[dict[str, Any]], tokenizer: Any = tokenizer) -> Lake:
        dump = tmp_path / "dump.jsonl"
        dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert import_rollouts(lake, with_formats([dump]), tokenizer).rows.refused == 0
        return lake

    return put
