"""The entropy tap inside vLLM: a logits processor for both of its model runners, and the door to it.

vLLM imports this module in its worker processes, by name.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as RunnerV1Processor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as RunnerV2Processor

from pipeline.engines.tap import EntropyTap, Tapped, TapRequest

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig


OWNER_VARIABLE = "ECHOMINE_OWNER_PID"  # the process that started the engine


class EntropyTapProcessor(RunnerV1Processor, RunnerV2Processor):  # type: ignore[misc]  # vLLM is untyped here
    """Tells the tap which row is whose, in the terms of the model runner that calls.

    Model Runner V1 keeps requests in rows that it fills, moves and swaps, and tells of it in
    `update_state`. V2 gives each request a slot for life and says at every step which row belongs to which.
    """

    def __init__(self, _vllm_config: VllmConfig, *runner: Any) -> None:
        """`runner` is (device, is_pin_memory) from V1, (request states,) from V2."""
        _end_with_owner()
        self.tap = EntropyTap()
        self._slots: dict[int, Tapped] = {}
        self._output_ids: dict[int, list[int]] = {}  # V1: each row's list, which the runner extends
        self._states = runner[0] if len(runner) == 1 else None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses n > 1: the samples of such a request share their arguments, so nothing tells them apart."""
        if TapRequest.of(sampling_params.extra_args) is not None and sampling_params.n != 1:
            raise ValueError("the entropy tap takes n = 1; send one request a sample")

    def is_argmax_invariant(self) -> bool:
        return False  # it draws; and it must see the logits before penalties and temperature

    # Model Runner V1

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._leave(slot)
        for slot, params, _, output_ids in batch_update.added:
            self._leave(slot)  # an added request may take the row of one that was there
            self._output_ids[slot] = output_ids
            self._enter(slot, params)
        for source, target, direction in batch_update.moved:
            for rows in (self._slots, self._output_ids):
                _move(rows, source, target, swap=direction is MoveDirectionality.SWAP)

    # Model Runner V2

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._leave(req_idx)
        return self._enter(req_idx, sampling_params)

    # both

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """[B, V] float32 logits, changed in place."""
        self.tap.apply(logits, self._rows_v1() if ctx is None else self._rows_v2(len(logits), ctx))
        return logits

    def _rows_v1(self) -> list[tuple[int, Tapped, int]]:
        # With asynchronous scheduling the newest ids in the list are placeholders; its length is right.
        return [(slot, self._slots[slot], len(self._output_ids[slot])) for slot in sorted(self._slots)]

    def _rows_v2(self, num_rows: int, ctx: LogitsContext) -> list[tuple[int, Tapped, int]]:
        assert self._states is not None
        slots = ctx.idx_mapping_np.tolist()
        if num_rows != len(slots):
            raise ValueError("the entropy tap does not work with speculative decoding: unset it")
        # Exact without speculative decoding: the tokens that the one drawn now can see.
        visible, prompt_len = ctx.seq_lens_upper_bound_np.tolist(), self._states.prompt_len.np
        return [
            (row, self._slots[slot], visible[row] - int(prompt_len[slot]))
            for row, slot in enumerate(slots)
            if slot in self._slots
        ]

    def _enter(self, slot: int, params: SamplingParams) -> bool:
        request = TapRequest.of(params.extra_args if params is not None else None)
        if request is not None:
            self._slots[slot] = self.tap.open(request)
        return request is not None

    def _leave(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self._output_ids.pop(slot, None)


def _end_with_owner() -> None:
    """Sees to it that the engine's processes end when the one that started them was killed.

    vLLM's core would wait for its next request for ever, and hold its GPUs.
    """
    owner, parent = int(os.environ.get(OWNER_VARIABLE, os.getpid())), os.getppid()
    if owner == os.getpid():
        return
    owner_exit = os.pidfd_open(owner)

    def wait() -> None:
        select.select([owner_exit], [], [])
        if parent not in (owner, 1):  # a worker's parent is the core
            os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="echomine-owner", daemon=True).start()


def _move(rows: dict[int, Any], source: int, target: int, swap: bool) -> None:
    """What was at `source` stands at `target`; with `swap` the other way as well."""
    there, here = rows.pop(target, None), rows.pop(source, None)
    if here is not None:
        rows[target] = here
    if swap and there is not None:
        rows[source] = there


class TapExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`); its methods are called by `collective_rpc`."""

    model_runner: Any
    reload_weights: Any

    def take_entropies(self, keys: list[str]) -> dict[str, bytes]:
        """See `EntropyTap.take`."""
        return self._tap().take(keys)

    def forget_entropies(self, keys: list[str]) -> None:
        self._tap().forget(keys)

    def exchange_weights(self, folder: str) -> None:
        """Loads the safetensors of `folder` in place of the weights that are there."""
        self.reload_weights(weights_path=folder)
        # vLLM packs weights for CPUs, and forgets to pack a head anew that is tied to the embedding.
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead) and isinstance(
                layer.quant_method, UnquantizedEmbeddingMethod
            ):
                layer.quant_method.process_weights_after_loading(layer)

    def count_tapped(self) -> int:
        """Requests that the tap holds."""
        return len(self._tap())

    def _tap(self) -> EntropyTap:
        runner = self.model_runner
        if hasattr(runner, "input_batch"):
            processors = list(runner.input_batch.logitsprocs.all)
        else:
            processors = runner.sampler.logits_processors
        (ours,) = (one for one in processors if isinstance(one, EntropyTapProcessor))
        return ours.tap
