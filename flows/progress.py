"""Progress bars on standard error, so that standard output stays for results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from trainer.metrics import StepMetrics

console = Console(stderr=True, highlight=False)


@contextmanager
def bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar; the yielded function sets how much is done. Silent where nobody watches."""
    with Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def training_progress(optim_steps: int) -> Iterator[Callable[[StepMetrics], None]]:
    with bar("training", optim_steps) as update:
        yield lambda metrics: update(metrics.optim_step + 1)
