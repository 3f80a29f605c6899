"""Stopping a running query, by its time or by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

AGAIN_SECONDS = 0.1  # an interrupt that comes before the query has begun is lost


@dataclass
class Stopped:
    """Who stopped a query, if it was stopped: the user, or else the clock."""

    by_user: bool = False


@contextmanager
def stoppable(interrupt: Callable[[], None], timeout_seconds: float | None) -> Iterator[Stopped]:
    """Calls `interrupt` when the time is up, and when the user presses Ctrl-C.

    Python's own KeyboardInterrupt would leave DuckDB computing, and the next query waiting for it.
    """
    stopped, done = Stopped(), threading.Event()

    def watch() -> None:
        if not done.wait(timeout_seconds):
            interrupt()
            while not done.wait(AGAIN_SECONDS):
                interrupt()

    def on_ctrl_c(*_: object) -> None:
        stopped.by_user = True
        interrupt()

    if timeout_seconds is not None:
        threading.Thread(target=watch, daemon=True).start()
    # only the main thread gets signals, and only it may say what they do
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, on_ctrl_c) if in_main_thread else None
    try:
        yield stopped
    finally:
        done.set()
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)
