"""A page that plots trainings: one HTML file that opens without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.chart_page import chart_page
from pipeline.errors import ConfigError, FormatError
from pipeline.pages import write_page
from pipeline.report_charts import Chart
from pipeline.report_text import number, percent, printable
from pipeline.training_charts import MEASURES, measure_chart, shares_chart
from pipeline.training_metrics import METRICS, Training, finite, read_training

# Okabe and Ito's, as the classes have; none is too pale or too dark for either background.
RUN_COLOURS = ("#0f84c9", "#d55e00", "#009e73", "#cc79a7", "#d9a400", "#56b4e9", "#7a86b8", "#9aa0a6")
MAX_NAMED_STEPS = 12


def write_training_report(folders: Sequence[Path], path: Path) -> Path:
    """Writes the page of the trainings in these folders, complete or not at all.

    Returns:
        `path`.

    Raises:
        ConfigError: more trainings than there are colours.
        FormatError: one of them has no step yet.
        LakeError: a folder holds no metrics, or `path` cannot be written.
    """
    if len(folders) > len(RUN_COLOURS):
        raise ConfigError(
            f"{len(folders)} trainings are more than the {len(RUN_COLOURS)} that one page can tell apart. "
            "Give --train less often."
        )
    runs = dict(zip(_labels(folders), map(read_training, folders), strict=True))
    for folder, run in zip(folders, runs.values(), strict=True):
        if not run.steps:
            why = run.faults[0] if run.faults else "The training has not finished its first."
            raise FormatError(f"{folder / METRICS} holds no whole optimizer step. {why} Try again later.")
    sections = _sections(runs)
    page = chart_page(
        "training.html",
        runs=[_facts(label, run) for label, run in runs.items()],
        colours=dict(zip(runs, RUN_COLOURS, strict=False)),
        figures=_figures(next(iter(runs.values()))) if len(runs) == 1 else [],
        shares=_shares(runs),
        sections={name: [chart for chart in charts if chart.spec] for name, charts in sections.items()},
        missing=[chart.title for charts in sections.values() for chart in charts if not chart.spec],
    )
    return write_page(page, path)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names; with those of their parents where two are the same."""
    names = Counter(folder.name for folder in folders)
    return [printable(folder.name if names[folder.name] == 1 else str(folder)) for folder in folders]


def _sections(runs: dict[str, Training]) -> dict[str, list[Chart]]:
    steps = {label: run.steps for label, run in runs.items()}
    colours = dict(zip(runs, RUN_COLOURS, strict=False))
    return {
        section: [measure_chart(title, name, steps, colours) for name, title in measures.items()]
        for section, measures in MEASURES.items()
    }


def _shares(runs: dict[str, Training]) -> list[Chart]:
    title = "Group classes"
    return [
        shares_chart(title if len(runs) == 1 else f"{title} · {label}", run.steps)
        for label, run in runs.items()
    ]


def _facts(label: str, run: Training) -> dict[str, Any]:
    skipped = [step["optim_step"] for step in run.steps if step.get("skipped") is True]
    named = ", ".join(map(str, skipped[:MAX_NAMED_STEPS])) + (" …" if len(skipped) > MAX_NAMED_STEPS else "")
    return {
        "label": label,
        "model": run.model,
        "objective": run.objective,
        "echo_source": run.echo_source,
        "num_steps": len(run.steps),
        "num_skipped": len(skipped),
        "skipped": named,
        "first_reward": _first(run, 1),
        "last_reward": _first(run, -1),
        "tokens_per_second": _median(run, "tokens_per_second"),
        "padding_share": _median(run, "padding_share"),
        "faults": run.faults,
    }


def _figures(run: Training) -> list[tuple[str, str, str]]:
    """(figure, name, meaning) of the row of key figures."""
    facts = _facts("", run)
    zero, padding = _median(run, "zero_advantage_share"), facts["padding_share"]
    return [
        (number(facts["num_steps"]), "optimizer steps", ""),
        (number(facts["num_skipped"]), "skipped", facts["skipped"] and f"optim_step {facts['skipped']}"),
        (number(facts["first_reward"], 3), "mean reward", "at the first step that sampled"),
        (number(facts["last_reward"], 3), "mean reward", "at the last one"),
        ("–" if zero is None else percent(zero, 1), "groups that taught nothing", "median of the steps"),
        (number(facts["tokens_per_second"]), "tokens / s", "median of the steps"),
        ("–" if padding is None else percent(padding, 1), "padding", "median of the steps"),
    ]


def _first(run: Training, direction: int) -> float | None:
    """The first reward of the steps, or the last one (−1)."""
    values = (finite(step, "reward_mean") for step in run.steps[::direction])
    return next((value for value in values if value is not None), None)


def _median(run: Training, measure: str) -> float | None:
    values = [value for step in run.steps if (value := finite(step, measure)) is not None]
    return median(values) if values else None
