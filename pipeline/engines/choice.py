"""Which engine samples: the configured one, or the best that this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import EngineConfig
from pipeline.engines.base import Engine
from pipeline.models import check_fit, config_facts, load_model


def engine_kind(config: EngineConfig) -> str:
    """vllm, transformers or server; `auto` is vLLM where it is installed."""
    if config.kind != "auto":
        return config.kind
    from pipeline.engines.vllm_start import installed_version

    return "vllm" if installed_version() is not None else "transformers"


def check_engine(config: EngineConfig) -> None:
    """Raises an EchoMineError for what is wrong with the engine's settings, before anything starts."""
    match engine_kind(config):
        case "vllm":
            from pipeline.engines.vllm_start import check_version, installed_version

            check_version(installed_version())
        case "server":
            from pipeline.engines.server import check_endpoints

            check_endpoints(config.server)


def open_engine(folder: Path, tokenizer: Any, config: EngineConfig) -> Engine:
    """A started engine, to be closed by its user.

    Raises:
        EngineError: it does not start.
        ModelError: the model cannot be loaded, or its tokenizer is another's.
    """
    check_fit(folder, tokenizer)
    # Each is imported when it is asked for: vLLM alone takes seconds.
    match engine_kind(config):
        case "vllm":
            from pipeline.engines.vllm import VllmEngine

            return VllmEngine(folder, tokenizer, config)
        case "server":
            from pipeline.engines.server import ServerEngine

            return ServerEngine(tokenizer, config.server, config_facts(folder).get("max_position_embeddings"))
        case _:
            from pipeline.engines.transformers import TransformersEngine

            model = load_model(folder, config.device, config.dtype)
            return TransformersEngine(model, tokenizer, config.entropy_kind, config.batch_rollouts)
