"""Fixtures of the server engine's tests: what a real server samples, and relays that stand before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from reference import ids_by_prompt
from server_helpers import REQUESTS, SAMPLING, engine
from vllm_server import Relay, Spoil

from pipeline.engines import server_pool, server_posts


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
