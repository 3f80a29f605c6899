"""vLLM engines in processes of their own, as in a night: nothing is lost when one dies."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from reference import (
    ARITH,
    arith_prompts,
    check_whole,
    differences,
    float64_model,
    requests_of,
)
from transformers import PreTrainedModel
from vllm_engines import EXACT, TOKENIZER, agreement, config_of, opened, sampled, scaled_model
from waiting import wait_until

from pipeline.config import SamplingConfig
from pipeline.engines import vllm_core
from pipeline.engines.base import Engine
from pipeline.engines.tap import Measured
from pipeline.engines.vllm import VllmEngine
from pipeline.engines.vllm_core import VllmCore
from pipeline.engines.vllm_failures import StartFailed
from pipeline.errors import EngineError
from pipeline.records import Sample


@pytest.fixture(scope="module")
def apart() -> Iterator[VllmEngine]:
    with opened(in_process=False) as engine:
        yield engine


def test_the_core_in_its_own_process_gives_the_same_numbers(
    apart: VllmEngine, exact: PreTrainedModel
) -> None:
    sampling, requests = SamplingConfig(max_tokens=48), requests_of(arith_prompts(16), group_size=4)
    groups = sampled(apart, requests, sampling)
    assert max(d.max() for d in differences(exact, groups)) <= EXACT
    with opened() as here:  # closed before `apart` starts anew: an open one keeps its environment for vLLM
        assert agreement(groups, sampled(here, requests, sampling)) > 0.95
    assert apart._cores[0].num_tapped() == 0


def test_stop_strings_cut_the_numbers_with_the_tokens_where_the_core_ran_on(
    apart: VllmEngine,
    exact: PreTrainedModel,
    transformers_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept_and_measured = []
    sample = VllmCore._sample

    def noted(core: VllmCore, index: int, seed: int, done: Any, measured: Measured) -> Sample:
        kept_and_measured.append((len(done[0]), len(measured.entropies)))
        return sample(core, index, seed, done, measured)

    monkeypatch.setattr(VllmCore, "_sample", noted)
    sampling = SamplingConfig(max_tokens=64, stop=("\n=", "#1"))
    requests = requests_of(arith_prompts(12), group_size=4)
    groups = sampled(apart, requests, sampling)
    assert max(of.max() for of in differences(exact, groups)) <= EXACT
    texts = [TOKENIZER.decode(s.completion_ids.tolist()) for g in groups for s in g.samples]
    assert sum(text.endswith(("\n=", "#1")) for text in texts) > len(texts) / 2
    assert not any("\n=" in text[:-1] or "#1" in text[:-1] for text in texts)
    assert agreement(groups, sampled(transformers_engine, requests, sampling)) == 1.0
    assert len(kept_and_measured) == 48
    assert all(measured >= kept for kept, measured in kept_and_measured)
    assert any(measured > kept for kept, measured in kept_and_measured)


def test_weights_are_exchanged_across_processes(apart: VllmEngine, tmp_path: Path) -> None:
    requests, sampling = requests_of(arith_prompts(24), 4), SamplingConfig(max_tokens=64)
    other = scaled_model(tmp_path / "model")
    apart.update_weights(other)
    groups = sampled(apart, requests, sampling)
    apart.update_weights(ARITH / "model")
    of_logprobs, of_entropies = differences(float64_model(other), groups)
    assert len(of_entropies) >= 2_000
    assert max(of_entropies.max(), of_logprobs.max()) <= EXACT


def engine_processes() -> list[psutil.Process]:
    """Those that run; one that was killed stays a while as a zombie."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.name().startswith("VLLM") and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # it ended since the list was made
            return False

    return [process for process in psutil.Process().children(recursive=True) if runs(process)]


def kill(processes: list[psutil.Process]) -> None:
    assert processes
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


def log_of(error: EngineError) -> Path:
    """The file that the message names."""
    found = re.search(r"Its log is (\S+\.log)\.", str(error))
    assert found
    return Path(found[1])


def test_an_engine_whose_worker_or_core_is_killed_starts_again_and_no_group_is_lost(
    apart: VllmEngine, exact: PreTrainedModel
) -> None:
    sampling, requests = SamplingConfig(max_tokens=64), requests_of(arith_prompts(32), group_size=4)
    groups = []
    for group in apart.generate(requests, sampling):
        groups.append(group)
        if len(groups) in (3, 12):  # first the worker alone, then the core and its worker together
            kill([p for p in engine_processes() if len(groups) == 12 or "Worker" in p.name()])
    check_whole(groups, requests, sampling)
    assert max(d.max() for d in differences(exact, groups)) <= EXACT


def test_an_engine_that_dies_too_often_is_one_line_and_the_next_call_starts_it_again(
    apart: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, requests = SamplingConfig(max_tokens=64), requests_of(arith_prompts(24), group_size=4)
    groups = []
    with monkeypatch.context() as patch:
        patch.setattr(apart._cores[0], "_config", config_of(in_process=False, max_restarts=0))
        stream = apart.generate(requests, sampling)
        groups.append(next(stream))
        kill(engine_processes())
        with pytest.raises(EngineError, match=r"max_restarts = 0\).*Finished groups are kept") as error:
            groups.extend(stream)
    assert "\n" not in str(error.value)
    assert log_of(error.value).is_file()
    assert 1 <= len(groups) < 24
    finished = {group.prompt.prompt_id for group in groups}
    left = [request for request in requests if request.prompt.prompt_id not in finished]
    check_whole([*groups, *apart.generate(left, sampling)], requests, sampling)


@pytest.fixture(scope="module")
def short_path() -> Iterator[Path]:
    """Sockets of vLLM's lie in the folder for temporary files, and the name of one has 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def refuse(*_: Any) -> None:
    raise StartFailed("There is no memory left.", Path(tempfile.mkdtemp()) / "vllm.log")


def test_a_restart_that_fails_is_tried_again_and_the_logs_go_when_one_succeeds(
    apart: VllmEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, short_path: Path
) -> None:
    monkeypatch.setattr(vllm_core, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    start, attempts = vllm_core.start_vllm, []

    def start_third(folder: Path, *rest: Any) -> Any:
        attempts.append(folder)
        return start(broken if len(attempts) < 3 else folder, *rest)

    broken = scaled_model(tmp_path / "model")
    (broken / "config.json").write_text("{}")
    sampling, requests = SamplingConfig(max_tokens=64), requests_of(arith_prompts(24), group_size=4)
    stream = apart.generate(requests, sampling)
    groups = [next(stream)]
    monkeypatch.setattr(vllm_core, "start_vllm", start_third)
    kill(engine_processes())
    check_whole([*groups, *stream], requests, sampling)
    assert len(attempts) == 3
    log = apart._cores[0]._engine.echomine_log
    assert list(short_path.glob("echomine-vllm-*.log")) == [log]


def test_why_an_engine_does_not_start_again_is_what_the_caller_hears(
    apart: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = apart.generate(requests_of(arith_prompts(24), group_size=4), SamplingConfig(max_tokens=64))
    next(stream)
    waits: list[float] = []
    monkeypatch.setattr(vllm_core, "sleep", waits.append)
    monkeypatch.setattr(vllm_core, "start_vllm", refuse)
    kill(engine_processes())
    with pytest.raises(EngineError, match=r"max_restarts = 3\): There is no memory left\. Finished groups"):
        list(stream)
    assert waits == [2.0, 4.0]
    assert apart._cores[0].num_tapped() == 0


@pytest.fixture(scope="module")
def pair() -> Iterator[VllmEngine]:
    with opened(in_process=False, data_parallel=2, max_num_seqs=4, max_restarts=0) as engine:
        yield engine


def test_two_engines_share_the_groups_and_one_that_fails_for_good_leaves_its_own_to_the_other(
    pair: VllmEngine,
    exact: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampling, requests = SamplingConfig(max_tokens=48), requests_of(arith_prompts(32), group_size=4)
    first, second = pair._cores
    groups = sampled(pair, requests, sampling)
    shares = [next(core._names) for core in pair._cores]
    (core,) = second._engine.engine_core.resources.engine_manager.processes
    processes = [psutil.Process(core.pid), *psutil.Process(core.pid).children(recursive=True)]
    for process in processes:
        process.suspend()

    def first_has_work() -> bool:
        return "vllm-0" in [thread.name for thread in threading.enumerate()]

    def kill_second_once_the_first_has_no_more_to_do() -> None:
        wait_until(first_has_work)
        wait_until(lambda: not first_has_work())
        kill(processes)

    killer = threading.Thread(target=kill_second_once_the_first_has_no_more_to_do)
    killer.start()
    with caplog.at_level(logging.WARNING, "pipeline"):
        again = sampled(pair, requests, sampling)
    killer.join()
    (ended,) = (record.getMessage() for record in caplog.records if "of 2 ended" in record.getMessage())
    assert re.match(r"Engine 2 of 2 ended: vLLM died, .*Its log is \S+\.log\.", ended)
    monkeypatch.setattr(vllm_core, "start_vllm", refuse)
    with pytest.raises(EngineError, match="no memory left"):
        pair.update_weights(scaled_model(tmp_path / "model"))  # the second cannot take them
    prompts = {group.prompt.prompt_id: group.prompt_ids for group in groups}
    line = deque((one, prompts[one.prompt.prompt_id]) for one in requests)
    after = list(first.stream(line, sampling))
    assert sum(shares) == 32
    assert min(shares) > 0  # groups that each engine was given
    assert next(second._names) > shares[1] + 1
    for found in (groups, again, after):
        assert max(of.max() for of in differences(exact, found)) <= EXACT


def test_when_a_second_engine_does_not_start_the_first_is_ended(
    pair: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = pair._cores[0]._engine  # starts in no time
    (core,) = running.engine_core.resources.engine_manager.processes
    processes = {psutil.Process(core.pid), *psutil.Process(core.pid).children(recursive=True)}
    assert processes <= set(engine_processes())
    starts = iter([lambda: running, refuse])
    monkeypatch.setattr(vllm_core, "start_vllm", lambda *_: next(starts)())
    pair._cores[0]._engine = None
    with pytest.raises(EngineError, match="no memory left"), opened(in_process=False, data_parallel=2):
        pass
    wait_until(lambda: not processes & set(engine_processes()))


def test_a_model_that_vllm_cannot_read_is_one_line_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(ARITH / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineError, match=r"vLLM does not start with .*Its log is") as error:
        VllmEngine(tmp_path / "model", TOKENIZER, config_of(in_process=False))
    assert "\n" not in str(error.value)
    assert log_of(error.value).is_file()
