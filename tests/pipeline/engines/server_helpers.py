"""What the tests of the server engine ask for, and ways to spoil what a server answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_server import MODEL, Answer, Spoil

from pipeline.config import SamplingConfig, ServerConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.server import ServerEngine
from pipeline.prompts import read_prompts
from pipeline.tokenization import load_tokenizer

SAMPLING = SamplingConfig(max_tokens=16, temperature=1.3)
TOKENIZER = load_tokenizer(MODEL)
REQUESTS = [GroupRequest(prompt, (i, 2**63 - 1 - i)) for i, prompt in enumerate(read_prompts("arith", 6))]


def engine(*urls: str, **settings: Any) -> ServerEngine:
    return ServerEngine(TOKENIZER, ServerConfig(endpoints=urls, **settings))


def spoiled(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """Changes the one choice of an answer."""

    def spoil(sent: dict[str, Any], answer: Answer) -> None:
        content = answer.json
        change(content["choices"][0])
        answer.json = content

    return spoil


def status(code: int, message: str) -> Spoil:
    def spoil(sent: dict[str, Any], answer: Answer) -> None:
        answer.status, answer.json = code, {"error": {"message": message, "code": code}}

    return spoil
