"""vLLM engines for tests: tiny, and closed whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import ARITH, check_whole, ids_by_prompt
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import EngineConfig, SamplingConfig, VllmConfig
from pipeline.engines.base import Engine, GroupRequest
from pipeline.engines.vllm import VllmEngine
from pipeline.models import load_model
from pipeline.records import Group
from pipeline.tokenization import load_tokenizer

TOKENIZER = load_tokenizer(ARITH / "model")
EXACT = 1e-4  # nats; float32 sums in another order


def config_of(entropy_kind: str = "full_vocab", dtype: str = "float32", **vllm: Any) -> EngineConfig:
    options = {"max_num_seqs": 16, "kv_cache_gib": 0.05, "enforce_eager": True, "in_process": True} | vllm
    return EngineConfig(kind="vllm", dtype=dtype, entropy_kind=entropy_kind, vllm=VllmConfig(**options))


@contextmanager
def opened(
    folder: Path = ARITH / "model", tokenizer: Any = TOKENIZER, **options: Any
) -> Iterator[VllmEngine]:
    engine = VllmEngine(folder, tokenizer, config_of(**options))
    try:
        yield engine
    finally:
        engine.close()


def preemptions(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the id of every request that an engine in this process preempts."""
    scheduler, preempted = engine._cores[0]._engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def noted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", noted)
    return preempted


def sampled(engine: Engine, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> list[Group]:
    """What the engine samples, checked to be whole."""
    groups = list(engine.generate(requests, sampling))
    check_whole(groups, requests, sampling)
    return groups


def agreement(groups: Sequence[Group], others: Sequence[Group]) -> float:
    """The share of completions that are the same to the token."""
    ours, theirs = ids_by_prompt(groups), ids_by_prompt(others)
    return float(np.mean([a == b for name in ours for a, b in zip(ours[name], theirs[name], strict=True)]))


def scaled_model(folder: Path, of: Path = ARITH / "model") -> Path:
    """A model, by default the tiny one, with other weights, as a trainer would save it."""
    return _saved(folder, lambda name, parameter: parameter.mul_(1.1), of)


def nan_model(folder: Path) -> Path:
    """The tiny model with a norm whose weight is NaN: so is every logit."""
    return _saved(
        folder, lambda name, parameter: parameter.fill_(torch.nan) if name == "model.norm.weight" else None
    )


def narrow_model(folder: Path) -> Path:
    """A checkpoint of the same layers and names, and another hidden size."""
    config = AutoConfig.from_pretrained(ARITH / "model")
    config.hidden_size //= 2
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def incomplete_model(folder: Path) -> Path:
    """The tiny model with other weights, without those of its first layer."""
    weights = scaled_model(folder) / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensors[name] for name in tensors if ".layers.0." not in name}, weights)
    return folder


def _saved(folder: Path, change: Callable[[str, torch.Tensor], object], of: Path = ARITH / "model") -> Path:
    model = load_model(of, "cpu", "float32")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(folder)
    return folder
