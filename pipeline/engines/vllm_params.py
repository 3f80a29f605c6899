"""What vLLM itself is asked for with each request, by who draws its tokens: the tap or vLLM's sampler."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.config import EngineConfig, SamplingConfig
from pipeline.engines.sampling import DrawRule
from pipeline.engines.tap import TapRequest
from pipeline.records import Float32


def sampling_params(key: str, seed: int, sampling: SamplingConfig, config: EngineConfig, on_cpu: bool) -> Any:
    """vLLM's `SamplingParams` of one request.

    Args:
        key: the request's name, under which the tap keeps what it measures.
        on_cpu: whether the engine runs on a CPU.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    draws = config.vllm.sampler == "tap"
    request = TapRequest(key, seed, sampling.max_tokens, DrawRule.of(sampling, config.entropy_kind), draws)
    if draws:
        # greedy takes what the tap made certain; a seed of vLLM's own is not needed, and together with
        # prompts that are read in pieces it would kill a CPU engine
        drawing: dict[str, Any] = {"temperature": 0.0}
    else:
        drawing = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": None if on_cpu else seed,
            "logprobs": 0,
            "flat_logprobs": True,
        }
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=request.as_arguments(),
        **drawing,
    )


def flat_logprobs(completion: Any) -> Float32 | None:
    """vLLM's own log-probs of the sampled tokens: the first entry of each position."""
    flat = completion.logprobs
    if flat is None:
        return None
    return np.array([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32)
