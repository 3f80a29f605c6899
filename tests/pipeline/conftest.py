"""An empty lake for each test: made once, then copied, since a lake is a folder like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.lake import Lake


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty") / "lake"
    Lake.create(folder)
    return folder


@pytest.fixture
def lake(empty: Path, tmp_path: Path) -> Lake:
    shutil.copytree(empty, tmp_path / "lake")
    return Lake.open(tmp_path / "lake")
