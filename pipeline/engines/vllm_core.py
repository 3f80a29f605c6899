"""One vLLM engine: feeding it, collecting finished groups with what the tap measured, starting it again."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np

from pipeline.config import EngineConfig, SamplingConfig
from pipeline.engines.base import GroupRequest, check_sample
from pipeline.engines.tap import Measured
from pipeline.engines.vllm_failures import EngineDead, StartFailed, reason
from pipeline.engines.vllm_params import flat_logprobs, sampling_params
from pipeline.engines.vllm_start import start_vllm, stop_vllm
from pipeline.engines.vllm_weights import check_complete
from pipeline.errors import EngineBug, EngineError
from pipeline.records import Float32, Group, Int32, Sample

log = logging.getLogger(__name__)

# before a second restart, and twice as long each time: whoever holds the memory may free it
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 2.0, 60.0
OUTSTANDING = 2  # requests in the engine, as a multiple of those that it runs at once


@dataclass
class _Running:
    """A group in the engine. `done` holds (completion ids, log-probs of vLLM or None, finish reason)."""

    request: GroupRequest
    prompt_ids: Int32
    keys: tuple[str, ...]
    done: dict[str, tuple[Int32, Float32 | None, str]] = field(default_factory=dict)


class VllmCore:
    """One vLLM engine, number `index` of those side by side; not to be used by two threads at once."""

    def __init__(self, folder: Path, tokenizer: Any, config: EngineConfig, index: int = 0) -> None:
        """Raises EngineError if the engine does not start."""
        self._config, self._tokenizer = config, tokenizer
        self.folder, self._index = folder, index
        self._names = itertools.count()
        self._dead_logs: list[Path] = []
        self._is_sampling = False  # a stream is open
        self._engine: Any = self._started()  # None once it died, until it is needed again
        self.max_model_len = int(self._engine.model_config.max_model_len)
        self._vocabulary = int(self._engine.model_config.get_vocab_size())

    def _started(self) -> Any:
        engine = start_vllm(self.folder, self._config, self._index)
        for log_path in self._dead_logs:  # whoever cannot be started again leaves them
            log_path.unlink(missing_ok=True)
        self._dead_logs.clear()
        return engine

    def stream(self, waiting: deque[tuple[GroupRequest, Int32]], sampling: SamplingConfig) -> Iterator[Group]:
        """Takes groups from `waiting` (which other engines may share) and yields them as they finish.

        An engine that dies is started again with the groups that it had; one that dies again and again
        without finishing any puts them back.

        Raises:
            EngineError: the engine died more often than `max_restarts`, or its answers contradict the tap.
        """
        running: dict[str, _Running] = {}  # by key; every key of a group leads to it
        restarts = 0
        self._is_sampling = True
        try:
            while True:
                try:
                    if self._engine is None:
                        if restarts > 1:
                            sleep(min(BACKOFF_SECONDS * 2.0 ** (restarts - 2), LONGEST_BACKOFF_SECONDS))
                        self._restart(running, sampling)
                    self._feed(waiting, running, sampling)
                    if not running:
                        return
                    for group in self._step(running):
                        restarts = 0
                        yield group
                except (EngineDead, StartFailed) as error:
                    restarts += 1
                    self._dead_logs.append(error.log_path)
                    if restarts > self._config.vllm.max_restarts:
                        raise EngineError(
                            "vLLM died, and the restarts without a group finished between are used up "
                            f"(engine.vllm.max_restarts = {restarts - 1}): {reason(error)} "
                            "Finished groups are kept; start the night again to go on."
                        ) from error
                    log.warning("vLLM died (%s); starting it again.", reason(error))
        finally:
            self._is_sampling = False
            self._give_up(waiting, running)

    def _feed(
        self,
        waiting: deque[tuple[GroupRequest, Int32]],
        running: dict[str, _Running],
        sampling: SamplingConfig,
    ) -> None:
        """Keeps the engine's line full, and no longer than that: the night's prompts are not its to hold."""
        while len(running) < OUTSTANDING * self._config.vllm.max_num_seqs:
            try:
                request, prompt_ids = waiting.popleft()
            except IndexError:
                return
            name = next(self._names)
            group = _Running(request, prompt_ids, tuple(f"{name}-{k}" for k in range(len(request.seeds))))
            running.update(dict.fromkeys(group.keys, group))
            self._submit(group, sampling)

    def _submit(self, group: _Running, sampling: SamplingConfig) -> None:
        on_cpu = self._engine.vllm_config.device_config.device_type == "cpu"
        for key, seed in zip(group.keys, group.request.seeds, strict=True):
            if key not in group.done:
                params = sampling_params(key, seed, sampling, self._config, on_cpu)
                prompt = {"type": "token", "prompt_token_ids": group.prompt_ids.tolist()}
                self._call("add_request", key, prompt, params)

    def _step(self, running: dict[str, _Running]) -> Iterator[Group]:
        """One step of the engine; the groups that are complete with it."""
        complete = []
        for output in self._call("step"):
            if not output.finished:
                continue
            group, completion = running[output.request_id], output.outputs[0]
            if completion.finish_reason not in ("stop", "length"):
                raise EngineError(
                    f"vLLM ended a completion with {completion.finish_reason!r}, which is neither stop nor "
                    "length. Start the night again."
                )
            group.done[output.request_id] = (
                np.array(completion.token_ids, dtype=np.int32),
                flat_logprobs(completion),
                completion.finish_reason,
            )
            if len(group.done) == len(group.keys):
                complete.append(group)
        if not complete:
            return
        keys = [key for group in complete for key in group.keys]
        measured = self._call("collective_rpc", "take_entropies", args=(keys,))[0]
        for group in complete:
            sampled = self._group(group, measured)
            for key in group.keys:  # not before: a group that is refused stays to be sampled
                del running[key]
            yield sampled

    def _group(self, group: _Running, measured: dict[str, bytes]) -> Group:
        samples = tuple(
            self._sample(index, seed, group.done[key], Measured.from_bytes(measured[key]))
            for index, (key, seed) in enumerate(zip(group.keys, group.request.seeds, strict=True))
        )
        return Group(group.request.prompt, group.prompt_ids, samples)

    def _sample(
        self, index: int, seed: int, done: tuple[Int32, Float32 | None, str], measured: Measured
    ) -> Sample:
        """The first T measurements are those of the completion: what came after it was cut off."""
        ids, of_vllm, finish_reason = done
        logprobs = measured.logprobs[: len(ids)] if of_vllm is None else of_vllm
        sample = Sample(index, seed, ids, logprobs, measured.entropies[: len(ids)], finish_reason)
        check_sample(sample, self._vocabulary)
        # only now: where logits are NaN, vLLM takes any token
        if of_vllm is None and not np.array_equal(measured.tokens[: len(ids)], ids):
            raise EngineBug("vLLM returned other tokens than the tap drew. This is a fault of ours.")
        return sample

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A call of the engine. Whatever tells of its death is an EngineDead; then it is stopped."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return getattr(self._engine, method)(*args, **kwargs)
        except EngineDeadError as error:
            dead, self._engine = self._engine, None
            raise EngineDead(stop_vllm(dead, keep_log=True)) from error

    def _restart(self, running: dict[str, _Running], sampling: SamplingConfig) -> None:
        """Starts anew. The tap died too, so finished samples of open groups are sampled again, same seeds."""
        self._engine = self._started()
        for group in {id(group): group for group in running.values()}.values():
            group.done.clear()
            self._submit(group, sampling)

    def _give_up(self, waiting: deque[tuple[GroupRequest, Int32]], running: dict[str, _Running]) -> None:
        """Ends what still runs when nobody asks for it any more, and puts it back in the line."""
        if not running:
            return
        keys = list(running)
        if self._engine is not None:
            try:
                self._call("abort_request", keys)
                self._call("collective_rpc", "forget_entropies", args=(keys,))
            except EngineDead:
                log.debug("vLLM is dead; there is nothing to abort.")
        for group in {id(group): group for group in running.values()}.values():
            waiting.appendleft((group.request, group.prompt_ids))

    def num_tapped(self) -> int:
        """Requests whose numbers the tap holds; bounded by those in the engine."""
        return 0 if self._engine is None else int(self._call("collective_rpc", "count_tapped")[0])

    def update_weights(self, folder: Path) -> None:
        """See `VllmEngine.update_weights`."""
        if self._is_sampling:
            raise EngineError(
                "The weights cannot be exchanged while groups are sampled, which would be of both. Take all "
                "groups that were asked for, or close their iterator, and exchange them then."
            )
        check_complete(folder, self.folder)  # before anything changes: the engine just goes on
        if self._engine is None:
            self._engine = self._started()
        try:
            self._call("collective_rpc", "exchange_weights", args=(str(folder),))
            self._call("reset_prefix_cache")
        except Exception as error:  # vLLM's loaders raise many kinds
            self.close()  # some weights may be exchanged, and vLLM now fails with those it had, too
            raise EngineError(
                f"vLLM cannot take the weights in {folder}: {reason(error)} "
                "Give a checkpoint of the same model."
            ) from error
        self.folder = folder

    def close(self) -> None:
        if self._engine is not None:
            stop_vllm(self._engine)
            self._engine = None
