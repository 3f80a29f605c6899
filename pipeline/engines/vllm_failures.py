"""Why vLLM failed, in one line: from its log, since what it raises often only points there."""

from __future__ import annotations

import re
from pathlib import Path

LOG_TAIL_BYTES = 200_000

# What vLLM and PyTorch say when memory is short, and the setting that helps.
_MEMORY = (
    (
        r"larger than the maximum number of tokens|KV cache.*(needed|is larger)|serve at least one request",
        "lower engine.vllm.max_model_len, or raise engine.vllm.kv_cache_gib (CPU) or gpu_memory_utilization",
    ),
    (
        r"on kv cache allocation is less than|can't allocate memory|MemoryError|Cannot allocate memory",
        "lower engine.vllm.kv_cache_gib",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|No available memory for the cache blocks|Free memory on device",
        "lower engine.vllm.max_num_seqs or gpu_memory_utilization, or raise tensor_parallel",
    ),
)

_RAISED = re.compile(r"^(?:\(.*?\) )?(?:ERROR [^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.M)


class EngineDead(Exception):
    """vLLM's process ended or cannot be reached."""


def why(error: BaseException) -> str:
    """The reason of a failure in one sentence: what vLLM's own log says, else the error itself."""
    engine = error.args[0] if error.args else None
    log_path = getattr(engine, "echomine_log", None)
    return reason(log_path, error) if log_path is not None else _sentence(str(error) or repr(error))


def reason(log_path: Path, error: BaseException) -> str:
    """The last error in the log that is no mere echo of another; if it is memory, the setting to change."""
    with log_path.open("rb") as file:
        file.seek(max(0, log_path.stat().st_size - LOG_TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    found = _RAISED.findall(text)
    causes = [line for line in found if "See root cause" not in line and "EngineCore" not in line]
    cause = _sentence(causes[-1] if causes else str(error) or repr(error))
    for pattern, cure in _MEMORY:
        if re.search(pattern, cause):
            return f"{cause} It ran out of memory: {cure}. Its log is {log_path}."
    return f"{cause} Its log is {log_path}."


def _sentence(text: str) -> str:
    return " ".join(text.split()).rstrip(".") + "."
