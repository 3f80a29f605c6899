"""Runs the real command in processes that are killed at random moments of their own duration."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

# Forked from a process that has these imported, a command starts at once: more kills in less time.
_WARM = ["flows.cli", "pipeline.lake", "pipeline.mine", "pipeline.shards", "pipeline.models"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_WARM)

SECONDS = 600  # a command that takes longer hangs


def command(arguments: Sequence[str], log: Path, prefect_url: str | None) -> None:
    """What a child does: `echomine ARGUMENTS…`, in a process group of its own."""
    os.setsid()
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ["PREFECT_HOME"] = str(log.parent / "prefect")
    if prefect_url is not None:  # else a night starts a server of its own, which outlives a kill
        os.environ["PREFECT_API_URL"] = prefect_url
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    from flows.cli import main

    sys.exit(main(arguments))


@dataclass
class Killer:
    """Kills commands at moments that `seed` decides, spread over the time that the last calm run took.

    Attributes:
        prefect_url: of a server that keeps the nights' records.
        num_kills: so far; a command that was done before its moment came does not count.
        calm_seconds: how long the last run took that was left alone.
    """

    seed: int
    log: Path
    prefect_url: str | None = None
    num_kills: int = 0
    calm_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def run(self, *arguments: object) -> int:
        """Runs a command to its end, and returns its exit code."""
        started = time.monotonic()
        process = self._start(arguments)
        process.join(SECONDS)
        # 2 is of an import that refused rows
        assert process.exitcode in (0, 2, 3), f"{arguments}: {process.exitcode}\n{self.log.read_text()}"
        self.calm_seconds = time.monotonic() - started
        return process.exitcode

    def kill(self, *arguments: object) -> bool:
        """Whether the command was killed on its way; it may have been done before its moment came."""
        moment = self._random.uniform(0.0, self.calm_seconds)
        process = self._start(arguments)
        process.join(moment)
        killed = process.exitcode is None
        if killed:
            assert process.pid
            try:  # with its children, as when a machine goes down
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # so young that it has no group of its own
                process.kill()
        process.join(SECONDS)
        self.num_kills += killed
        print(f"seed {self.seed}: {arguments[0]} {'killed' if killed else 'done'} after {moment:.3f} s")
        return killed

    def _start(self, arguments: Sequence[object]) -> BaseProcess:
        process = _context.Process(
            target=command, args=([str(a) for a in arguments], self.log, self.prefect_url)
        )
        process.start()
        return process
