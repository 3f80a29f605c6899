"""What the benchmarks share: interleaved medians, the machine in one line, a table."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def medians(
    sides: Mapping[str, Callable[[], object]],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds that each side takes: the median of `repeats` runs, after one that is not counted.

    The sides take turns, so that a machine that slows down slows down all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            started = clock()
            side()
            if repeat:
                seconds[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_mebibytes() -> float:
    """The greatest resident memory of this program. (getrusage counts what its parent held at its start.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def machine() -> str:
    """Processor, cores that this process may use, memory, GPUs, and the versions that matter."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(
        [
            f"{_processor()} ({len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads)",
            f"{memory:.0f} GiB",
            *gpus,
            f"Python {platform.python_version()}",
            f"torch {torch.__version__}",
        ]
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The table in Markdown, below the machine and the command that made it."""
    print(f"\nmachine: {machine()}")
    print(f"command: python {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")
