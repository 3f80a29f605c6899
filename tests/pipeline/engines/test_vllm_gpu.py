"""The vLLM engine on an NVIDIA GPU, where Model Runner V2 is the default: `make test-gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference import ARITH, arith_prompts, differences, requests_of
from transformers import PreTrainedModel
from vllm_engines import opened, preemptions, sampled

from pipeline.config import EngineConfig, SamplingConfig
from pipeline.engines import vllm_start
from pipeline.models import load_model

pytestmark = pytest.mark.gpu

SAMPLING = SamplingConfig(max_tokens=64, temperature=1.2)
REQUESTS = requests_of(arith_prompts(32), group_size=4)
BLOCKS = 24  # of 16 tokens: enough for the longest request, too few for the 16 that run
RUNNER = "vllm.v1.worker.gpu.model_runner"
GPU = {"enforce_eager": None, "gpu_memory_utilization": 0.3}  # with CUDA graphs, as a night has them


def test_float32_entropies_are_exact_in_a_process_of_its_own(exact: PreTrainedModel) -> None:
    with opened(in_process=False, **GPU) as engine:
        scheduler = engine._cores[0]._engine.vllm_config.scheduler_config
        groups = sampled(engine, REQUESTS, SAMPLING)
    assert scheduler.async_scheduling  # steps are in flight while the last one's tokens are read
    of_logprobs, of_entropies = differences(exact, groups)
    assert len(of_entropies) >= 2_000
    assert max(of_entropies.max(), of_logprobs.max()) <= 1e-3


def test_runner_v2_is_exact_while_prompts_are_read_in_pieces_and_requests_preempted(
    exact: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = vllm_start._arguments

    def with_few_blocks(folder: Path, config: EngineConfig) -> dict[str, Any]:
        few = {"num_gpu_blocks_override": BLOCKS, "block_size": 16, "max_model_len": 256}
        return arguments(folder, config) | few

    monkeypatch.setattr(vllm_start, "_arguments", with_few_blocks)
    with opened(max_num_seqs=16, max_num_batched_tokens=24, **GPU) as engine:
        preempted = preemptions(engine, monkeypatch)
        groups = sampled(engine, REQUESTS, SAMPLING)  # 128 requests
        core = engine._cores[0]._engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
    of_logprobs, of_entropies = differences(exact, groups)
    assert max(of_entropies.max(), of_logprobs.max()) <= 1e-3
    assert len(preempted) >= 3
    assert type(runner).__module__ == RUNNER


def test_bfloat16_entropies_stay_near_those_of_the_bfloat16_weights() -> None:
    with opened(in_process=False, dtype="bfloat16", **GPU) as engine:
        groups = sampled(engine, REQUESTS, SAMPLING)
    policy = load_model(ARITH / "model", "cpu", "bfloat16").double()
    of_logprobs, of_entropies = differences(policy, groups)
    assert len(of_entropies) >= 2_000
    assert of_entropies.mean() <= 0.03
    assert of_logprobs.mean() <= 0.03
