"""Why vLLM failed, from what its processes printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.engines.vllm_failures import EngineDead, reason

CORE = "(EngineCore pid=47) ERROR 11-23 02:42:59 [core.py:1100] "
WORKER = "(Worker_TP0 pid=48) ERROR 11-23 02:42:58 [multiproc_executor.py:921] "
ECHO = (
    f"{CORE}EngineCore failed to start.\n"
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
)


@pytest.mark.parametrize(
    ("raised", "setting"),
    [
        (
            f"{WORKER}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a "
            "total capacity of 79.11 GiB of which 1.05 GiB is free.",
            "lower engine.vllm.max_num_seqs or gpu_memory_utilization",
        ),
        (
            f"{CORE}ValueError: Free memory on device cuda:0 (11.5/79.11 GiB) on startup is less than "
            "desired GPU memory utilization (0.9, 71.2 GiB). Decrease GPU memory utilization.",
            "lower engine.vllm.max_num_seqs or gpu_memory_utilization",
        ),
        (
            f"{CORE}ValueError: No available memory for the cache blocks. Try increasing "
            "`gpu_memory_utilization` when initializing the engine.",
            "raise engine.vllm.gpu_memory_utilization",
        ),
        (
            f"{CORE}ValueError: To serve at least one request with the model's max seq len (131072), (16.0 "
            "GiB KV cache is needed, which is larger than the available KV cache memory (9.4 GiB).",
            "lower engine.vllm.max_model_len",
        ),
        (
            f"{WORKER}ValueError: Available memory on node 0 (12.1/15.6 GiB) on kv cache allocation is less "
            "than requested memory for kv (64.0 GiB). Decrease --kv-cache-memory-bytes.",
            "lower engine.vllm.kv_cache_gib",
        ),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 96636764160000 bytes. Error code 12 (Cannot allocate memory)",
            "lower engine.vllm.kv_cache_gib",
        ),
        (f"{CORE}MemoryError: Unable to allocate 12.0 GiB", "lower engine.vllm.kv_cache_gib"),
    ],
    ids=["CUDA", "taken GPU", "no cache", "long context", "CPU cache", "CPU", "host"],
)
def test_memory_that_is_short_names_the_setting_that_helps(tmp_path: Path, raised: str, setting: str) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(f"INFO starting\n{CORE}Traceback (most recent call last):\n{raised}\n{ECHO}")
    said = reason(EngineDead(log))
    assert f"It ran out of memory: {setting}" in said
    assert raised.split("Error: ")[1][:40] in said
    assert said.endswith(f"Its log is {log}.")


def test_what_is_no_memory_is_told_as_it_is_and_a_silent_end_as_an_end(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(f"{CORE}ValueError: The checkpoint has no weight lm_head.\n{ECHO}")
    assert reason(EngineDead(log)) == f"ValueError: The checkpoint has no weight lm_head. Its log is {log}."
    log.write_text(f"{CORE}ValueError: too few tokens [type=value_error, input_value=ArgsKwargs(…)]\n{ECHO}")
    assert reason(EngineDead(log)) == f"ValueError: too few tokens. Its log is {log}."
    log.write_text("")
    assert reason(EngineDead(log)) == f"vLLM's process ended. Its log is {log}."
    assert reason(KeyError("x")) == "'x'."
    log.unlink()
    gone = f"vLLM's process ended. Its log {log} is not to be read: No such file or directory."
    assert reason(EngineDead(log)) == gone
