"""One `vllm serve` endpoint: what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np

from pipeline.config import SamplingConfig, ServerConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.server_answers import (
    Card,
    EndpointFault,
    Models,
    Refusal,
    Tokens,
    Unreachable,
    believed,
    parsed,
    refuse_status,
)
from pipeline.errors import EngineError, nearest, said
from pipeline.records import Group, Int32, Sample

# Greedy by truncation: after temperature and truncation each of its tokens has probability 1.
PROBE = SamplingConfig(max_tokens=8, top_k=1)


class Endpoint:
    """Asks one server for samples.

    Its methods raise EndpointFault where another server may do better, and EngineError where every
    further request would fail until the user acts.

    Attributes:
        model: the name the weights are served under; before `check`, the configured one.
        context: prompt and completion tokens the server takes at most; None where it does not say.
    """

    def __init__(
        self, url: str, config: ServerConfig, tokenizer: Any, vocabulary: int, client: httpx.AsyncClient
    ) -> None:
        """`vocabulary` is one more than the tokenizer's greatest id."""
        self.url = url
        self.root = url.rstrip("/").removesuffix("/v1")
        self.model = config.model
        self.context: int | None = None
        self.timeout_seconds = config.timeout_seconds
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.client = client

    async def check(self, text: str, prompt_ids: Int32) -> None:
        """Learns the model's name and context, and that tokenizer and log-probs are what we take them for.

        Args:
            text: some prompt's, which both tokenizers must read alike.
            prompt_ids: [P] of some prompt; sampling continues the first of them.
        """
        async with _time_limit(self.timeout_seconds):
            served = parsed(Models, await self._ask("GET", "/v1/models"))
            card = self._card(served.data)
            self.model, self.context = card.id, card.max_model_len
            await self._check_tokenizer(text)
            probe = await self._sample(prompt_ids[:1], 0, 0, PROBE)
        if not np.any(probe.logprobs):
            raise EngineError(
                f"{self.url} gives log-probs after temperature and truncation, and here they stand for those "
                f"before. Start it without --logprobs-mode, or with raw_logprobs."
            )

    async def group(self, request: GroupRequest, prompt_ids: Int32, sampling: SamplingConfig) -> Group:
        """All samples of a group, one request each: asked for `n`, vLLM seeds sample i with seed + i.

        Args:
            prompt_ids: [P] token ids.
        """
        try:
            async with _time_limit(self.timeout_seconds), asyncio.TaskGroup() as tasks:
                samples = [
                    tasks.create_task(self._sample(prompt_ids, index, seed, sampling))
                    for index, seed in enumerate(request.seeds)
                ]
        except BaseExceptionGroup as errors:  # the first cancelled the others
            raise errors.exceptions[0] from None
        return Group(request.prompt, prompt_ids, tuple(task.result() for task in samples))

    async def _sample(self, prompt_ids: Int32, index: int, seed: int, sampling: SamplingConfig) -> Sample:
        prompt = prompt_ids.tolist()
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop": list(sampling.stop),
            "seed": seed,
            # unsaid, the served model's generation_config.json decides these
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,  # the sampled token's, no other
            "return_token_ids": True,
        }
        answer = await self._ask("POST", "/v1/completions", body)
        choice = believed(answer, prompt, sampling.max_tokens, self.vocabulary)
        return Sample(
            sample_index=index,
            seed=seed,
            completion_ids=np.array(choice.token_ids, dtype=np.int32),
            logprobs=np.minimum(np.array(choice.logprobs.token_logprobs, dtype=np.float32), 0.0),
            entropies=None,
            finish_reason=choice.finish_reason,
        )

    def _card(self, cards: list[Card]) -> Card:
        """The configured model's entry, or the only one."""
        named = [card for card in cards if card.id == self.model]
        if named or (self.model is None and len(cards) == 1):
            return (named or cards)[0]
        wanted = (
            "several models, and engine.server.model names none"
            if self.model is None
            else f"no model `{self.model}` (engine.server.model)"
        )
        raise EngineError(
            f"{self.url} serves {wanted}; {nearest(self.model or '', [card.id for card in cards])}"
        )

    async def _check_tokenizer(self, text: str) -> None:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            theirs = parsed(Tokens, await self._ask("POST", "/tokenize", body)).tokens
        except Refusal as refusal:
            if refusal.code in (404, 405):
                return  # some gateways pass on /v1 alone
            raise
        ours = self.tokenizer.encode(text, add_special_tokens=False)
        if theirs != ours:
            raise EngineError(
                f"{self.url} serves `{self.model}` with another tokenizer than the night's model: "
                f"{text[:40]!r} is {theirs[:8]} there and {ours[:8]} here. Serve the night's model, or give "
                f"the night the one that is served."
            )

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            response = await self.client.request(method, self.root + path, json=body)
        except httpx.HTTPError as error:
            raise Unreachable(said(error)) from None
        refuse_status(self.url, path, response)
        return response.content


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EndpointFault(f"no answer within {seconds:g} s (engine.server.timeout_seconds)") from None
