"""vLLM engines in processes of their own, as in a night: nothing is lost when one dies."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

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

from pipeline.config import SamplingConfig
from pipeline.engines.vllm import VllmEngine
from pipeline.errors import EngineError


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


def test_weights_are_exchanged_across_processes(apart: VllmEngine, tmp_path: Path) -> None:
    other = scaled_model(tmp_path / "model")
    apart.update_weights(other)
    groups = list(apart.generate(requests_of(arith_prompts(4), 4), SamplingConfig(max_tokens=32)))
    apart.update_weights(ARITH / "model")
    assert differences(float64_model(other), groups)[1].max() <= EXACT


def engine_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM")]


def test_an_engine_whose_worker_or_core_is_killed_starts_again_and_no_group_is_lost(
    apart: VllmEngine, exact: PreTrainedModel
) -> None:
    sampling, requests = SamplingConfig(max_tokens=64), requests_of(arith_prompts(32), group_size=4)
    groups = []
    for group in apart.generate(requests, sampling):
        groups.append(group)
        if len(groups) in (3, 12):  # first the worker alone, then the core and its worker together
            victims = [p for p in engine_processes() if len(groups) == 12 or "Worker" in p.name()]
            assert victims
            for process in victims:
                os.kill(process.pid, signal.SIGKILL)
    check_whole(groups, requests, sampling)
    assert max(d.max() for d in differences(exact, groups)) <= EXACT


def test_two_engines_side_by_side_share_the_groups(exact: PreTrainedModel) -> None:
    sampling, requests = SamplingConfig(max_tokens=48), requests_of(arith_prompts(32), group_size=4)
    with opened(in_process=False, data_parallel=2, max_num_seqs=4) as engine:
        groups = sampled(engine, requests, sampling)
        names = [next(core._names) for core in engine._cores]
    check_whole(groups, requests, sampling)
    assert max(d.max() for d in differences(exact, groups)) <= EXACT
    assert sum(names) == 32
    assert min(names) > 0  # groups that each engine was given


def test_a_model_that_vllm_cannot_read_is_one_line_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(ARITH / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineError, match=r"vLLM does not start with .*Its log is") as error:
        VllmEngine(tmp_path / "model", TOKENIZER, config_of(in_process=False))
    assert "\n" not in str(error.value)
