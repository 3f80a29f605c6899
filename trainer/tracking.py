"""Where a training's steps can be watched: `metrics.jsonl`, and TensorBoard's event files beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.training_metrics import EVENTS, METRICS, SETTINGS
from trainer.metrics import StepMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Tracks:
    """Takes each step down as it is done."""

    def __init__(self, lines: TextIO, events: SummaryWriter | None) -> None:
        self._lines, self._events = lines, events

    def write(self, step: StepMetrics) -> None:
        """On disk at once: someone may be watching, and a kill must not lose what a state has."""
        write_line(self._lines, step)
        if self._events is not None:
            for name, value in scalars(step).items():
                self._events.add_scalar(name, value, step.optim_step)
            self._events.flush()


@contextmanager
def open_tracks(folder: Path, config: TrainConfig, steps: Sequence[StepMetrics] = ()) -> Iterator[Tracks]:
    """Tracks in a training's folder, which goes on from `steps`.

    `metrics.jsonl` is made anew of them. Event files stay, and TensorBoard is told to forget what they
    hold from the next step on.

    Raises:
        ConfigError: the files or their folder cannot be made.
    """
    path, events = folder / METRICS, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = path.open("w", encoding="utf-8")
        for step in steps:
            write_line(lines, step)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = SummaryWriter(str(folder / EVENTS), purge_step=len(steps))
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error}. Choose another folder.") from None
    with lines:
        try:
            yield Tracks(lines, events)
        finally:
            if events is not None:
                events.close()


def write_line(file: TextIO, step: StepMetrics) -> None:
    file.write(json.dumps(asdict(step), allow_nan=False) + "\n")
    file.flush()


def scalars(step: StepMetrics) -> dict[str, float]:
    """What of a step is a number, by the names of `metrics.jsonl`; each class's share is `classes/<name>`."""
    values: dict[str, Any] = asdict(step)
    shares = {f"classes/{name}": share for name, share in values.pop("classes").items()}
    del values["optim_step"]
    return {name: float(value) for name, value in {**values, **shares}.items() if value is not None}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note in a training's folder what it trains, and how, for those who read its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{SETTINGS}.partial"
    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / SETTINGS)
