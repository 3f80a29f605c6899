"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import sample_lake as sample


@pytest.fixture(scope="session")
def chromium() -> Path:
    """Debian's Chromium. Where it is missing the test skips loudly; in CI it fails."""
    path = shutil.which("chromium")
    if path is None:
        reason = "NOT TESTED: there is no Chromium to open the page in. Run `apt-get install chromium`."
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(path)


@pytest.fixture(scope="session")
def sample_lake(tmp_path_factory: pytest.TempPathFactory) -> sample.SampleLake:
    """A mined lake with every class of group. It is shared: tests only read it."""
    return sample.sample_lake(tmp_path_factory.mktemp("sample") / "lake")
