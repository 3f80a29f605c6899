"""Which engine samples where the configuration leaves it open."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from pipeline.config import EngineConfig
from pipeline.engines import vllm_start
from pipeline.engines.choice import engine_kind


def test_auto_is_vllm_where_it_is_installed_and_else_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm_start.installed_version() is not None  # every machine that runs the tests has one
    assert engine_kind(EngineConfig()) == engine_kind(EngineConfig(kind="auto")) == "vllm"
    for kind in ("transformers", "server"):
        assert engine_kind(EngineConfig(kind=kind)) == kind

    def not_installed(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(vllm_start, "version", not_installed)
    assert engine_kind(EngineConfig()) == "transformers"
