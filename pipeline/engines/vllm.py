"""The vLLM engine: whole groups, streamed as they finish, with the entropy tap where the logits are."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

from pipeline.config import EngineConfig, SamplingConfig
from pipeline.engines.base import BACKLOG_GROUPS, GroupRequest, refuse_long_prompts, request_ids
from pipeline.engines.vllm_core import VllmCore
from pipeline.errors import EngineError
from pipeline.records import Group

BACKLOG_SECONDS = 0.1  # how long an engine waits before it looks again whether its groups were taken

log = logging.getLogger(__name__)


class VllmEngine:
    """One vLLM engine, or several side by side (`engine.vllm.data_parallel`)."""

    logprobs_kind = "raw"

    def __init__(self, folder: Path, tokenizer: Any, config: EngineConfig) -> None:
        """Starts the engines, which takes seconds to minutes.

        Raises:
            EngineError: no vLLM, one of a version that was not tested, or one that does not start.
        """
        self.tokenizer = tokenizer
        self.entropy_kind: str = config.entropy_kind
        self.overlaps = not config.vllm.in_process
        self._cores: list[VllmCore] = []
        with ExitStack() as started:
            for index in range(config.vllm.data_parallel):
                self._cores.append(VllmCore(folder, tokenizer, config, index))
                started.callback(self._cores[index].close)
            started.pop_all()

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """See `Engine.generate`.

        Raises:
            EngineError: an engine died more often than `engine.vllm.max_restarts` allows.
        """
        prompts = [request_ids(self.tokenizer, request) for request in requests]
        refuse_long_prompts(requests, prompts, sampling, self._cores[0].max_model_len)
        waiting = deque(zip(requests, prompts, strict=True))
        if len(self._cores) == 1:
            yield from self._cores[0].stream(waiting, sampling)
        else:
            yield from self._side_by_side(waiting, sampling)

    def _side_by_side(self, waiting: deque[Any], sampling: SamplingConfig) -> Iterator[Group]:
        """Every engine takes from the same line; one that fails for good leaves its groups to the others."""
        finished: queue.Queue[Group | _Ended] = queue.Queue()
        stop = threading.Event()
        threads: list[threading.Thread] = []

        def start(core: VllmCore) -> None:
            thread = threading.Thread(
                target=_pull,
                args=(core, waiting, sampling, finished, stop),
                name=f"vllm-{self._cores.index(core)}",
                daemon=True,
            )
            threads.append(thread)
            thread.start()

        for core in self._cores:
            start(core)
        try:
            running, failure = len(self._cores), None
            idle: list[VllmCore] = []
            while running:
                item = finished.get()
                if isinstance(item, Group):
                    yield item
                    continue
                running -= 1
                if item.failure is None:
                    idle.append(item.core)
                else:
                    failure = item.failure
                    number, of = self._cores.index(item.core) + 1, len(self._cores)
                    log.warning("Engine %d of %d ended: %s", number, of, failure)
                if waiting and idle:  # what an engine that failed has put back
                    start(idle.pop())
                    running += 1
            if failure is not None and waiting:
                raise failure
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def update_weights(self, folder: Path) -> None:
        """See `UpdatableEngine.update_weights`; what was cached of prompts is dropped.

        An engine that refuses the weights starts again with those that it had.
        """
        with ExitStack() as undo:
            for core in self._cores:
                before = core.folder
                core.update_weights(folder)
                undo.callback(core.update_weights, before)
            undo.pop_all()

    def close(self) -> None:
        """Ends the engines and gives their memory back."""
        with ExitStack() as stack:
            for core in self._cores:
                stack.callback(core.close)


@dataclass(frozen=True)
class _Ended:
    """What an engine's thread tells last: it has no more to do, or cannot go on."""

    core: VllmCore
    failure: EngineError | None = None


def _pull(
    core: VllmCore,
    waiting: deque[Any],
    sampling: SamplingConfig,
    finished: queue.Queue[Group | _Ended],
    stop: threading.Event,
) -> None:
    """Streams one engine's groups into the queue, and how it ended."""
    try:
        for group in itertools.takewhile(lambda _: not stop.is_set(), core.stream(waiting, sampling)):
            finished.put(group)
            while finished.qsize() >= BACKLOG_GROUPS and not stop.is_set():
                sleep(BACKLOG_SECONDS)
    except EngineError as error:
        finished.put(_Ended(core, error))
    except BaseException as error:
        finished.put(_Ended(core, EngineError(f"An engine failed: {error!r}")))
        raise
    else:
        finished.put(_Ended(core))
