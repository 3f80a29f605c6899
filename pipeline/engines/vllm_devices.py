"""Which GPUs, or cores, each of several vLLM engines has for itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from pipeline.config import EngineConfig
from pipeline.errors import EngineError


def device_variables(config: EngineConfig, index: int) -> dict[str, str]:
    """Environment variables that give engine `index` of `engine.vllm.data_parallel` devices of its own.

    Raises:
        EngineError: there are fewer GPUs than the engines need together.
    """
    if not on_cpu():
        import torch

        visible = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
        return {"CUDA_VISIBLE_DEVICES": ",".join(own_gpus(visible, config, index))}
    num_engines = config.vllm.data_parallel
    if num_engines == 1:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    own = cores[index::num_engines] or [cores[index % len(cores)]]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, own))}


def visible_gpus(variable: str | None, count: int) -> list[str]:
    """The names of the `count` GPUs that CUDA shows, under this CUDA_VISIBLE_DEVICES."""
    if variable is None:
        return [str(i) for i in range(count)]
    # CUDA stops at the first name that it does not know
    return [name.strip() for name in variable.split(",")][:count]


def own_gpus(visible: Sequence[str], config: EngineConfig, index: int) -> list[str]:
    """Engine `index`'s share of the visible GPUs. `cuda:N` counts among these, and is the first that is used.

    Raises:
        EngineError: there are fewer than the engines need together.
    """
    first = int(config.device.removeprefix("cuda:")) if ":" in config.device else 0
    usable, each, num_engines = visible[first:], config.vllm.tensor_parallel, config.vllm.data_parallel
    if num_engines * each > len(usable):
        raise EngineError(
            f"engine.vllm.data_parallel = {num_engines} times tensor_parallel = {each} needs "
            f"{num_engines * each} GPUs, and with engine.device = {config.device} there are {len(usable)}. "
            "Lower one of them, or show this process more GPUs (CUDA_VISIBLE_DEVICES)."
        )
    return list(usable[index * each : (index + 1) * each])


def refuse_other_device(device: str, cpu: bool) -> None:
    """Raises EngineError where `engine.device` names what the installed vLLM is not built for."""
    if cpu and device.startswith("cuda"):
        raise EngineError(
            f"engine.device = {device}, and the vLLM installed is built for CPUs. Set it to auto."
        )
    if not cpu and device == "cpu":
        raise EngineError(
            "engine.device = cpu, and the vLLM installed is built for GPUs. Set it to auto, or set "
            'engine.kind = "transformers".'
        )


def on_cpu() -> bool:
    """Whether the vLLM that is installed runs on CPUs."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        from vllm.platforms import current_platform

        return bool(current_platform.is_cpu())
    return True
