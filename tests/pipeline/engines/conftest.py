"""What the engines' tests share: references, an engine in this process, and relays before a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from reference import ARITH, float64_model, ids_by_prompt
from server_helpers import REQUESTS, SAMPLING, engine
from transformers import PreTrainedModel
from vllm_engines import TOKENIZER, opened
from vllm_server import Relay, Spoil

from pipeline.engines import server_pool, server_posts
from pipeline.engines.transformers import TransformersEngine
from pipeline.engines.vllm import VllmEngine
from pipeline.models import load_model


@pytest.fixture(scope="session")
def exact() -> PreTrainedModel:
    return float64_model()


@pytest.fixture(scope="session")
def transformers_engine() -> TransformersEngine:
    return TransformersEngine(load_model(ARITH / "model", "cpu", "float32"), TOKENIZER)


@pytest.fixture(scope="module")
def plain() -> Iterator[VllmEngine]:
    """One in this process, where vLLM allows no second; starting it takes seconds."""
    with opened() as engine:
        yield engine


@pytest.fixture(scope="session")
def expected(arith_server: str) -> dict[str, list[list[int]]]:
    """What the real server alone samples for REQUESTS, by prompt."""
    return ids_by_prompt(engine(arith_server).generate(REQUESTS, SAMPLING))


@pytest.fixture
def relay(arith_server: str) -> Iterator[Callable[..., Relay]]:
    """Makes relays to the real server; they are stopped in the end."""
    with ExitStack() as stack:

        def make(spoil: Spoil | None = None, **options: Any) -> Relay:
            made = Relay(arith_server, spoil, **options)
            stack.callback(made.stop)
            return made

        yield make


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_posts, "FIRST_BACKOFF_SECONDS", 0.02)
    # every server gets groups, on a busy machine, too
    monkeypatch.setattr(server_pool, "GRACE_SECONDS", 60.0)
