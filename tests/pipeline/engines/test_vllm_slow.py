"""The entropies of a real language model of 49,152 tokens, against teacher forcing in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from reference import arith_prompts, check_whole, differences, float64_model, requests_of
from vllm_engines import opened, preemptions, scaled_model

from pipeline.config import EngineConfig, SamplingConfig, VllmConfig
from pipeline.engines.vllm import VllmEngine
from pipeline.models import load_model, model_folder
from pipeline.records import Group, Prompt
from pipeline.tokenization import load_tokenizer

pytestmark = pytest.mark.slow

SAMPLING = SamplingConfig(max_tokens=40, temperature=0.8, top_p=0.95)


def sampled(dtype: str, **vllm: int) -> list[Group]:
    folder = model_folder("smollm2")
    options = {"max_num_seqs": 16, "kv_cache_gib": 0.5, "max_model_len": 512} | vllm
    config = EngineConfig(kind="vllm", dtype=dtype, vllm=VllmConfig(**options))
    engine = VllmEngine(folder, load_tokenizer(folder), config)
    requests = requests_of(arith_prompts(16), group_size=4)
    try:
        groups = list(engine.generate(requests, SAMPLING))
    finally:
        engine.close()
    check_whole(groups, requests, SAMPLING, vocabulary=49_152)
    return groups


def test_float32_entropies_of_a_language_model_are_exact_while_prompts_are_read_in_pieces() -> None:
    groups = sampled("float32", max_num_batched_tokens=24)
    of_logprobs, of_entropies = differences(float64_model(model_folder("smollm2")), groups)
    assert len(of_entropies) >= 2_000
    print(f"float32: largest {of_entropies.max():.2e}, of log-probs {of_logprobs.max():.2e} nats")
    assert of_entropies.max() <= 1e-3
    assert of_logprobs.max() <= 1e-3


def test_float32_entropies_of_a_language_model_are_exact_when_preempted_and_after_an_exchange_of_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, sampling = model_folder("smollm2"), SamplingConfig(max_tokens=24)
    # eight prompts of 116 tokens fill eight of the cache's ten blocks of 128, and soon ask for eight more
    prompts = [Prompt(({"role": "user", "content": "+".join(["7"] * 42 + [str(i)])},)) for i in (10, 11)]
    requests = requests_of(prompts, group_size=5)
    settings = {"max_num_seqs": 8, "max_model_len": 256, "kv_cache_gib": 0.056}
    other = scaled_model(tmp_path / "model", of=folder)
    with opened(folder, load_tokenizer(folder), **settings) as engine:
        preempted = preemptions(engine, monkeypatch)
        groups = list(engine.generate(requests, sampling))
        preempted_before = len(preempted)
        engine.update_weights(other)
        of_other = list(engine.generate(requests, sampling))
    assert 0 < preempted_before < len(preempted)
    for weights, sampled_by in ((folder, groups), (other, of_other)):
        check_whole(sampled_by, requests, sampling, vocabulary=49_152)
        of_logprobs, of_entropies = differences(float64_model(weights), sampled_by)
        print(
            f"{len(of_entropies)} tokens: largest {of_entropies.max():.2e}, "
            f"of log-probs {of_logprobs.max():.2e} nats"
        )
        assert of_entropies.max() <= 1e-3
        assert of_logprobs.max() <= 1e-3


def test_bfloat16_entropies_of_a_language_model_stay_near() -> None:
    """Near those of the policy that samples: the weights as bfloat16 holds them."""
    groups = sampled("bfloat16")
    policy = load_model(model_folder("smollm2"), "cpu", "bfloat16").double()
    of_logprobs, of_entropies = differences(policy, groups)
    print(f"bfloat16: mean {of_entropies.mean():.4f}, of log-probs {of_logprobs.mean():.4f} nats")
    assert len(of_entropies) >= 2_000
    assert of_entropies.mean() <= 0.03  # with the output layer in bfloat16 too it would be 0.030
