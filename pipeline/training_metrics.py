"""What a training left in its folder for those who watch it, read as what it is: somebody's text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import LakeError, nearest, said

METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
EVENTS = "tensorboard"
MAX_STEP = 2**53  # beyond it a browser cannot count


@dataclass(frozen=True)
class Training:
    """A training as its folder tells it.

    Attributes:
        name: of the folder.
        model, objective, echo_source: None where `settings.json` does not say.
        steps: by optim_step; values may be of any type.
        faults: what of `metrics.jsonl` could not be taken as it stands, in sentences.
    """

    name: str
    model: str | None
    objective: str | None
    echo_source: str | None
    steps: list[dict[str, Any]]
    faults: list[str]


def find_training(lake: Path, run: str) -> Path:
    """The folder of a training that is given by its id, its folder, or the metrics in it.

    Args:
        lake: the lake's folder, where ids are looked for.

    Raises:
        LakeError: there is none.
    """
    if os.path.isfile(run) and os.path.basename(run) == METRICS:
        return Path(run).resolve().parent
    if os.path.isdir(run):
        return Path(run).resolve()
    known = {folder.name: folder for folder in sorted(lake.glob("runs/*/training-*")) if folder.is_dir()}
    if run in known:
        return known[run].resolve()
    hint = nearest(run, known) if known else f"the lake in {lake} has none; `echomine train` makes one."
    raise LakeError(f"No folder and no id of a training is `{run}`: {hint}")


def read_training(folder: Path) -> Training:
    """Reads a training's metrics, whole or not.

    Raises:
        LakeError: the folder has no metrics, or they cannot be read.
    """
    path = folder / METRICS
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise LakeError(f"{folder} holds no {METRICS}. Give the folder or id of a training.") from None
    except OSError as error:
        raise LakeError(f"Cannot read {path}: {said(error)}. Permit reading it.") from None
    steps, faults = _steps(text)
    settings = _settings(folder / SETTINGS)
    train = settings.get("train")
    train = train if isinstance(train, dict) else {}
    return Training(
        folder.name,
        _text(settings.get("model")),
        _text(train.get("objective")),
        _text(train.get("echo_source")),
        steps,
        faults,
    )


def finite(step: Mapping[str, Any], measure: str) -> float | None:
    """A step's value of a measure, None where it has none that can be drawn."""
    value = step.get(measure)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # JSON's whole numbers have no bounds
        return None
    return value if math.isfinite(value) else None


def _steps(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    lines = text.split("\n")
    by_step: dict[int, dict[str, Any]] = {}
    bad: list[int] = []
    doubled = wrong = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        step = _step(line)
        if step is None:
            bad.append(number)
            continue
        doubled += step["optim_step"] in by_step
        wrong += sum(finite(step, name) is None for name, value in step.items() if _says(name, value))
        by_step[step["optim_step"]] = step
    faults = []
    if bad and bad[-1] == len(lines):  # whole lines end with a newline
        faults.append("The last line is cut off: the training is writing it, or was killed while it did.")
        bad.pop()
    if bad:
        faults.append(f"{_counted(len(bad), 'line')} left out, as no step stands there: first line {bad[0]}.")
    if doubled:
        faults.append(f"{_counted(doubled, 'step')} written more than once: the last is shown.")
    if wrong:
        faults.append(f"{_counted(wrong, 'value')} not shown, as no finite number.")
    return [by_step[number] for number in sorted(by_step)], faults


def _step(line: str) -> dict[str, Any] | None:
    try:
        step = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(step, dict):
        return None
    number = step.get("optim_step")
    whole = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < MAX_STEP
    return step if whole else None


def _says(name: str, value: Any) -> bool:
    """Whether a value should be a number."""
    return value is not None and name not in ("skipped", "classes")


def _settings(path: Path) -> dict[str, Any]:
    """Nothing where they are missing or damaged: a training can be watched without."""
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name} is" if count == 1 else f"{count:,} {name}s are"
