"""Why vLLM failed, in one line: from its log, since what it raises often only points there."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import EngineError

LOG_TAIL_BYTES = 200_000

# What vLLM and PyTorch say when memory is short, and the setting that helps.
_MEMORY = (
    (
        r"larger than the maximum number of tokens|KV cache.*(needed|is larger)|serve at least one request",
        "lower engine.vllm.max_model_len, or raise engine.vllm.kv_cache_gib (CPU) or gpu_memory_utilization",
    ),
    (
        r"No available memory for the cache blocks",
        "raise engine.vllm.gpu_memory_utilization or tensor_parallel, or lower engine.vllm.max_num_seqs",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|Free memory on device",
        "lower engine.vllm.max_num_seqs or gpu_memory_utilization, or raise tensor_parallel",
    ),
    (
        r"on kv cache allocation is less than|can't allocate memory|MemoryError|Cannot allocate memory",
        "lower engine.vllm.kv_cache_gib",
    ),
)

_RAISED = re.compile(r"^(?:\(.*?\) )?(?:ERROR [^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.M)


class EngineDead(Exception):
    """vLLM's process ended or cannot be reached. What it printed is in `log_path`."""

    def __init__(self, log_path: Path) -> None:
        super().__init__("vLLM's process ended")
        self.log_path = log_path


class StartFailed(EngineError):
    """vLLM did not start; a later attempt may do better. What it printed is in `log_path`."""

    def __init__(self, message: str, log_path: Path) -> None:
        super().__init__(message)
        self.log_path = log_path


def reason(error: BaseException) -> str:
    """Why vLLM failed, in one sentence: what the log of an engine that died says, else the error itself."""
    if isinstance(error, EngineDead):
        return reason_in_log(error.log_path, error)
    return _sentence(str(error) or repr(error))


def reason_in_log(log_path: Path, error: BaseException) -> str:
    """The last error in the log that is no mere echo of another; if it is memory, the setting to change.

    Args:
        error: what is told where the log holds none, or cannot be read.
    """
    try:
        with log_path.open("rb") as file:
            file.seek(max(0, log_path.stat().st_size - LOG_TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError as unread:  # folders of temporary files are swept
        return (
            f"{_sentence(str(error) or repr(error))} Its log {log_path} is not to be read: {unread.strerror}."
        )
    found = _RAISED.findall(text)
    causes = [line for line in found if "See root cause" not in line and "EngineCore" not in line]
    told = causes[-1] if causes else str(error) or repr(error)
    cause = _sentence(told.partition(" [type=")[0])  # pydantic goes on with the values and an address
    for pattern, cure in _MEMORY:
        if re.search(pattern, cause):
            return f"{cause} It ran out of memory: {cure}. Its log is {log_path}."
    return f"{cause} Its log is {log_path}."


def _sentence(text: str) -> str:
    return " ".join(text.split()).rstrip(".") + "."
