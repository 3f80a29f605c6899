"""The processor follows every request through the rows of both model runners, with vLLM's own classes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality, build_logitsprocs
from vllm.v1.worker.cpu import buffer_utils as cpu_buffers
from vllm.v1.worker.gpu import buffer_utils as gpu_buffers
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)
from vllm.v1.worker.gpu.states import RequestState

from pipeline.engines.sampling import DrawRule, draw, noise
from pipeline.engines.tap import Measured, TapRequest
from pipeline.engines.vllm_start import PROCESSOR
from pipeline.engines.vllm_tap import EntropyTapProcessor

V, MAX_TOKENS = 64, 16
SWAP, MOVE = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL


def request(key: str) -> TapRequest:
    return TapRequest(key, sum(key.encode()), MAX_TOKENS, DrawRule())


def params(key: str) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, extra_args=request(key).as_arguments())


def logits_of(key: str, position: int) -> torch.Tensor:
    """[V]: what the model would say for this request at this position."""
    seed = sum(key.encode()) * 1000 + position
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 2


def expected(key: str, num_tokens: int) -> list[int]:
    logits = torch.stack([logits_of(key, position) for position in range(num_tokens)])
    return draw(logits, torch.from_numpy(noise(request(key).seed, num_tokens)), DrawRule()).tokens.tolist()


class RunnerV1:
    """The rows of a batch as Model Runner V1 keeps them: a list of output ids in each, extended in place."""

    def __init__(self) -> None:
        (self.processor,) = (
            one
            for one in build_logitsprocs(VllmConfig(), torch.device("cpu"), False, False, [PROCESSOR]).all
            if isinstance(one, EntropyTapProcessor)
        )
        self.rows: list[str] = []
        self.outputs: dict[str, list[int]] = {}

    def update(
        self,
        rows: list[str],
        removed: list[int] = (),
        added: dict[int, str] | None = None,
        moved: list[Any] = (),
    ) -> None:
        self.rows, added = rows, added or {}
        for key in added.values():
            self.outputs[key] = list(self.outputs.get(key, []))  # a resumed request's list is a new object
        additions = [(slot, params(key), [1], self.outputs[key]) for slot, key in added.items()]
        self.processor.update_state(BatchUpdate(len(rows), removed, additions, moved))

    def step(self, discarded: tuple[str, ...] = (), lagging: bool = False) -> None:
        """One pass. A discarded token is thrown away; a lagging runner notes −1 for each."""
        logits = torch.stack([logits_of(key, len(self.outputs[key])) for key in self.rows])
        for key, row in zip(self.rows, self.processor.apply(logits), strict=True):
            if key not in discarded:
                self.outputs[key].append(-1 if lagging else int(row.argmax()))

    def passes(self, *batches: tuple[list[str], dict[str, Any]]) -> None:
        """A pass over each of the batches: its rows, and what `update` is told has changed."""
        for rows, changes in batches:
            self.update(rows, **changes)
            self.step()

    def measured(self, key: str) -> Measured:
        return Measured.from_bytes(self.processor.tap.take([key])[key])


def check(runner: RunnerV1, **num_tokens: int) -> None:
    """Each request has the tokens, and so the numbers, of its own positions."""
    for key, count in num_tokens.items():
        found = runner.measured(key)
        assert found.tokens[:count].tolist() == expected(key, count)
        assert np.isfinite(found.entropies[:count]).all()
        if -1 not in runner.outputs[key]:
            assert runner.outputs[key] == expected(key, count)


def test_rows_that_move_and_swap_stay_with_their_requests() -> None:
    runner = RunnerV1()
    runner.passes(
        (["a", "b", "c"], {"added": {0: "a", 1: "b", 2: "c"}}),
        (["c", "b", "a"], {"moved": [(0, 2, SWAP)]}),
        (["a", "b"], {"removed": [0], "moved": [(2, 0, MOVE)]}),  # c is done, a fills its row
    )
    check(runner, a=3, b=3, c=2)


def test_a_row_that_is_used_again_belongs_to_the_newcomer() -> None:
    runner = RunnerV1()
    runner.passes(
        (["a", "b"], {"added": {0: "a", 1: "b"}}),
        (["d", "b"], {"removed": [0], "added": {0: "d"}}),
        (["d", "e"], {"added": {1: "e"}}),  # added over a row that was not reported as removed
    )
    check(runner, a=1, b=2, d=2, e=1)


def test_a_prompt_read_in_pieces_draws_the_same_tokens_and_counts_once() -> None:
    runner = RunnerV1()
    runner.update(["a", "b"], added={0: "a", 1: "b"})
    for _ in range(3):
        runner.step(discarded=("b",))
    runner.step()
    check(runner, a=4, b=1)


def test_a_request_that_is_preempted_and_resumed_goes_on_where_it_was() -> None:
    runner = RunnerV1()
    runner.update(["a", "b"], added={0: "a", 1: "b"})
    runner.step()
    runner.step()
    runner.update(["b"], removed=[0], moved=[(1, 0, MOVE)])
    runner.step()
    runner.update(["b", "a"], added={1: "a"})
    runner.step(discarded=("a",))  # its prompt and tokens are read again, in two pieces
    runner.step()
    check(runner, a=3, b=5)


def test_asynchronous_scheduling_whose_tokens_lag_is_followed_by_their_number() -> None:
    runner = RunnerV1()
    runner.update(["a"], added={0: "a"})
    for _ in range(3):
        runner.step(lagging=True)
    assert runner.outputs["a"] == [-1, -1, -1]
    found = runner.measured("a")
    assert found.tokens.tolist() == expected("a", 3)


def test_a_step_too_many_after_the_last_token_changes_nothing() -> None:
    runner = RunnerV1()
    runner.update(["a"], added={0: "a"})
    for _ in range(MAX_TOKENS + 1):
        runner.step(lagging=True)
    assert runner.measured("a").tokens.tolist() == expected("a", MAX_TOKENS)


def test_requests_that_are_not_ours_keep_their_logits() -> None:
    runner = RunnerV1()
    runner.processor.update_state(BatchUpdate(1, [], [(0, SamplingParams(), [1], [])], []))
    logits = logits_of("x", 0)[None]
    assert torch.equal(runner.processor.apply(logits.clone()), logits)
    assert len(runner.processor.tap) == 0


def test_several_samples_in_one_request_are_refused() -> None:
    validate = build_custom_logits_processors_params_validator([PROCESSOR])
    many = SamplingParams(n=2, extra_args=request("a").as_arguments())
    with pytest.raises(VLLMValidationError, match="one request a sample"):
        validate(many)
    validate(params("a"))
    validate(SamplingParams(n=2))


class RunnerV2:
    """The slots of Model Runner V2, on CPU tensors: any row of a step may be any slot."""

    def __init__(self) -> None:
        # as vLLM's CPU worker does: there is no pinned memory
        gpu_buffers.UvaBuffer = cpu_buffers.UvaBuffer
        self.states = RequestState(4, 64, 64, 0, V, torch.device("cpu"))
        (self.processor,) = build_custom_logits_processors(VllmConfig(), self.states, False, [PROCESSOR])
        self.outputs: dict[str, list[int]] = {}
        self.prompt_len: dict[str, int] = {}

    def add(self, key: str, prompt_len: int) -> None:
        """A new request, or one that was preempted: then its tokens so far are read again with the prompt."""
        output = self.outputs.setdefault(key, [])
        self.prompt_len[key] = prompt_len
        ids = [1] * prompt_len + output
        self.states.add_request(key, prompt_len, ids, 0, MAX_TOKENS)
        self.processor.add_request(self.states.req_id_to_index[key], params(key))
        self.processor.apply_staged_writes()

    def remove(self, key: str) -> None:
        self.states.remove_request(key)

    def step(self, rows: list[str], seen: dict[str, int] | None = None) -> None:
        """One forward pass over these rows; `seen`: tokens read so far of requests still being read."""
        seen, slots = seen or {}, [self.states.req_id_to_index[key] for key in rows]
        lengths = [seen.get(key, self.prompt_len[key] + len(self.outputs[key])) for key in rows]
        mapping = torch.tensor(slots, dtype=torch.int32)
        context = LogitsContext(
            expanded_idx_mapping=mapping,
            idx_mapping=mapping,
            idx_mapping_np=mapping.numpy(),
            expanded_local_pos=torch.zeros_like(mapping),
            input_ids=torch.ones_like(mapping),
            pos=torch.tensor(lengths) - 1,
            seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
        )
        logits = torch.stack(
            [logits_of(key, n - self.prompt_len[key]) for key, n in zip(rows, lengths, strict=True)]
        )
        for key, row in zip(rows, self.processor.apply(logits, context), strict=True):
            if key not in seen:
                self.outputs[key].append(int(row.argmax()))

    def check(self, key: str, num_tokens: int) -> None:
        found = Measured.from_bytes(self.processor.tap.take([key])[key])
        assert found.tokens[:num_tokens].tolist() == expected(key, num_tokens) == self.outputs[key]
        assert np.isfinite(found.entropies[:num_tokens]).all()


def test_runner_v2_rows_are_found_by_their_slots_in_any_order() -> None:
    runner = RunnerV2()
    for key, length in [("a", 3), ("b", 5), ("c", 2)]:
        runner.add(key, length)
    for rows in (["a", "b", "c"], ["c", "a"], ["b", "c", "a"]):
        runner.step(rows)
    runner.remove("c")
    runner.add("d", 4)  # takes the slot of c
    runner.step(["d", "a"])
    for key, num_tokens in [("a", 4), ("b", 2), ("c", 3), ("d", 1)]:
        runner.check(key, num_tokens)


def test_runner_v2_prompts_in_pieces_and_resumed_requests_count_once() -> None:
    runner = RunnerV2()
    runner.add("a", 6)
    runner.add("b", 6)
    runner.step(["a", "b"], seen={"b": 2})
    runner.step(["b", "a"], seen={"b": 5})
    runner.step(["a", "b"])
    runner.remove("a")  # preempted with three tokens
    runner.step(["b"])
    runner.add("a", 6)
    runner.step(["b", "a"], seen={"a": 4})
    runner.step(["b", "a"], seen={"a": 8})  # past its prompt, in the middle of its own tokens
    runner.step(["a", "b"])
    runner.check("a", 4)
    runner.check("b", 5)


def test_runner_v2_steps_in_flight_after_the_last_token_change_nothing() -> None:
    runner = RunnerV2()
    runner.add("a", 3)
    runner.add("b", 5)
    runner.step(["a"])
    for _ in range(MAX_TOKENS):
        runner.step(["b", "a"])  # in the last of them a has all its tokens, and b draws its own last
    assert len(runner.outputs["a"]) == MAX_TOKENS + 1
    del runner.outputs["a"][MAX_TOKENS:]
    runner.check("a", MAX_TOKENS)
    runner.check("b", MAX_TOKENS)


def test_speculative_decoding_is_refused_by_name() -> None:
    runner = RunnerV2()
    runner.add("a", 3)
    mapping = torch.tensor([runner.states.req_id_to_index["a"]], dtype=torch.int32)
    two_rows = mapping.repeat(2)
    context = LogitsContext(
        two_rows, mapping, mapping.numpy(), two_rows * 0, two_rows, two_rows, np.array([4], dtype=np.int32)
    )
    with pytest.raises(ValueError, match="speculative decoding"):
        runner.processor.apply(torch.zeros(2, V), context)


def test_a_worker_and_the_core_above_it_end_with_the_process_that_owns_them(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    script = (
        "import os, time\n"
        "from pipeline.engines.vllm_tap import EntropyTapProcessor\n"
        "EntropyTapProcessor(None, None, False)\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    # it starts the worker, as vLLM's core does; in a session of its own, to end for no other reason
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"
    core = subprocess.Popen(
        [sys.executable, "-c", launcher],
        env=os.environ | {"ECHOMINE_OWNER_PID": str(owner.pid)},
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert core.stdout is not None
    worker = psutil.Process(int(core.stdout.readline()))
    assert worker.ppid() == core.pid != os.getpid()
    time.sleep(0.2)
    assert worker.is_running()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert core.wait(timeout=600) == -signal.SIGKILL
    worker.wait(timeout=600)  # psutil waits for processes that are no children of ours, too
    assert not worker.is_running()
