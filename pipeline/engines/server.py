"""The `server` engine: samples from a pool of `vllm serve` endpoints over HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

import httpx

from pipeline.config import SamplingConfig, ServerConfig
from pipeline.engines.base import GroupRequest, refuse_long_prompts, request_ids
from pipeline.engines.server_endpoint import Endpoint
from pipeline.engines.server_pool import Pool
from pipeline.engines.server_posts import Job
from pipeline.errors import ConfigError, EngineError
from pipeline.records import Group

OTHER_FILES = 256  # open files that are no connections of ours

ItemT = TypeVar("ItemT")


class ServerEngine:
    """Samples from servers that hold the night's model. Entropies stay None: the scorer fills them in.

    Every sample carries its own seed, so a server gives the same tokens for it again as far as its
    arithmetic does (float32 on a CPU; on a GPU, batches of other sizes round differently). Temperatures
    below 0.01 count as 0.01 to vLLM. On a CPU, vLLM 0.32 dies where seeds meet a prompt that is read in
    chunks (`CPU Generator does not use offset`): serve there with --no-enable-chunked-prefill. That the
    served weights are the night's cannot be seen from here.

    Attributes:
        logprobs_kind: each endpoint is probed for it, since a server can be started otherwise.
    """

    logprobs_kind = "raw"
    entropy_kind = None
    overlaps = True

    def __init__(self, tokenizer: Any, config: ServerConfig, context: int | None = None) -> None:
        """
        Args:
            tokenizer: the night's model's; prompts are sent as its token ids.
            context: prompt and completion tokens of that model; the servers may allow fewer.

        Raises:
            ConfigError: no endpoints, one that is no URL, or no API key where one is named.
        """
        self.tokenizer = tokenizer
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.config = config
        self.context = context
        self.urls = _urls(config)
        self.headers = _headers(config)
        self._stops: set[Callable[[], None]] = set()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """See `Engine.generate`. Closing the iterator cancels what is under way.

        Raises:
            EngineError: no endpoint is left, one refuses for a reason that stays, or some groups failed
                `max_attempts` times; these are reported after the others were handed out.
            PromptError: also where an endpoint takes fewer tokens than `context`.
        """
        if not requests:
            return
        prompts = [request_ids(self.tokenizer, one) for one in requests]
        refuse_long_prompts(requests, prompts, sampling, self.context)
        samples_at_once = self.config.concurrency * max(len(one.seeds) for one in requests)
        client = _client(self.headers, len(self.urls) * samples_at_once)
        endpoints = [Endpoint(url, self.config, self.tokenizer, self.vocabulary, client) for url in self.urls]
        jobs = [Job(one, prompt_ids) for one, prompt_ids in zip(requests, prompts, strict=True)]
        groups: SimpleQueue[Group | None] = SimpleQueue()
        pool = Pool(jobs, endpoints, self.config, sampling, groups.put, groups.qsize)
        yield from self._in_background(pool.run(client), groups)

    def close(self) -> None:
        """Ends every `generate` that is under way."""
        for stop in list(self._stops):
            stop()

    def _in_background(
        self, work: Coroutine[Any, Any, None], items: SimpleQueue[ItemT | None]
    ) -> Iterator[ItemT]:
        """What `work` puts into `items`, while a thread's event loop runs it; then what it raised."""
        loop = asyncio.new_event_loop()
        task = loop.create_task(work)
        task.add_done_callback(lambda _: items.put(None))
        thread = threading.Thread(target=_run, args=(loop, task), name="server-engine", daemon=True)

        def stop() -> None:
            with suppress(RuntimeError):  # the loop has come to its end by itself
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

        self._stops.add(stop)
        thread.start()
        try:
            while (item := items.get()) is not None:
                yield item
            thread.join()
            if task.cancelled():
                raise EngineError("The server engine was closed while it sampled. Start again for the rest.")
            task.result()
        finally:
            stop()
            self._stops.discard(stop)


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    try:
        loop.run_until_complete(asyncio.wait([task]))  # what it raises is the caller's
        loop.run_until_complete(loop.shutdown_default_executor())  # names are looked up in its threads
    finally:
        loop.close()


def _client(headers: dict[str, str], num_connections: int) -> httpx.AsyncClient:
    """A client for so many requests at once, or as many as this process may have files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        num_connections = max(1, soft - OTHER_FILES)
    limits = httpx.Limits(
        max_connections=num_connections,
        max_keepalive_connections=num_connections,
        # uvicorn closes connections that idle for 5 s; one that we close first is not lost in a race
        keepalive_expiry=2.0,
    )
    # only connecting is bounded here: an answer's time is bounded for the group
    return httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(None, connect=10.0), headers=headers)


def check_endpoints(config: ServerConfig) -> None:
    """Raises ConfigError for no endpoints, one that is no URL, or no API key where one is named."""
    _urls(config)
    _headers(config)


def _urls(config: ServerConfig) -> list[str]:
    if not config.endpoints:
        raise ConfigError(
            "The server engine has no endpoints. Set engine.server.endpoints to the base URLs of your "
            "`vllm serve`, such as http://gpu1:8000/v1."
        )
    for url in config.endpoints:
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL:
            parts = httpx.URL()
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ConfigError(
                f"engine.server.endpoints holds `{url}`, which is no URL of a server. "
                f"Write it as http://gpu1:8000/v1."
            )
    return list(dict.fromkeys(url.rstrip("/") for url in config.endpoints))


def _headers(config: ServerConfig) -> dict[str, str]:
    if config.api_key_env is None:
        return {}
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"engine.server.api_key_env names the environment variable {config.api_key_env}, which is not "
            f"set. Set it to the servers' API key."
        )
    return {"Authorization": f"Bearer {key}"}
