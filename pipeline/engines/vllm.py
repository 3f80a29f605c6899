"""The vLLM engine: whole groups, streamed as they finish, with the entropy tap where the logits are."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import EngineConfig, SamplingConfig
from pipeline.engines.base import GroupRequest, refuse_long_prompts
from pipeline.engines.vllm_core import VllmCore
from pipeline.errors import EngineError
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Group


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
        self._cores = [VllmCore(folder, tokenizer, config, i) for i in range(config.vllm.data_parallel)]

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """See `Engine.generate`. Token ids may differ with what else runs, by the rounding of batched sums.

        Raises:
            EngineError: an engine died more often than `engine.vllm.max_restarts` allows.
        """
        prompts = [prompt_messages_ids(self.tokenizer, request.prompt.messages) for request in requests]
        refuse_long_prompts(requests, prompts, sampling, self._cores[0].max_model_len)
        waiting = deque(zip(requests, prompts, strict=True))
        if len(self._cores) == 1:
            yield from self._cores[0].stream(waiting, sampling)
        else:
            yield from self._side_by_side(waiting, sampling)

    def _side_by_side(self, waiting: deque[Any], sampling: SamplingConfig) -> Iterator[Group]:
        """Every engine takes from the same line; one that fails for good leaves its groups to the others."""
        finished: queue.Queue[Group | EngineError | None] = queue.Queue()
        stop = threading.Event()
        threads = [
            threading.Thread(target=_pull, args=(core, waiting, sampling, finished, stop), daemon=True)
            for core in self._cores
        ]
        for thread in threads:
            thread.start()
        try:
            running, failure = len(threads), None
            while running:
                item = finished.get()
                if isinstance(item, Group):
                    yield item
                    continue
                running -= 1
                failure = item or failure
            if failure is not None and waiting:
                raise failure
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def update_weights(self, folder: Path) -> None:
        """Exchanges the weights in the running engines for those of another folder of the same model.

        What was cached of prompts under the old weights is dropped. No group may be running.

        Raises:
            EngineError: the folder's weights do not fit the model.
        """
        for core in self._cores:
            core.update_weights(folder)

    def close(self) -> None:
        """Ends the engines and gives their memory back."""
        for core in self._cores:
            core.close()


def _pull(
    core: VllmCore,
    waiting: deque[Any],
    sampling: SamplingConfig,
    finished: queue.Queue[Group | EngineError | None],
    stop: threading.Event,
) -> None:
    """Streams one engine's groups into the queue; None, or what ended it, comes last."""
    try:
        for group in itertools.takewhile(lambda _: not stop.is_set(), core.stream(waiting, sampling)):
            finished.put(group)
    except EngineError as error:
        finished.put(error)
    except BaseException as error:
        finished.put(EngineError(f"An engine failed: {error!r}"))
        raise
    else:
        finished.put(None)
