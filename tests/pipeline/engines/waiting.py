"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 600  # on a busy machine


def wait_until(true: Callable[[], bool]) -> None:
    """Returns once it is true; fails where it does not come true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"it was not true within {PATIENCE_SECONDS} s"
        time.sleep(0.01)
