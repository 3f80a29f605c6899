"""The charts of trainings: each measure over the optimizer steps, one line for each training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import altair as alt
import polars as pl

from pipeline.report_charts import CLASS_COLOURS, NEUTRAL, Chart, card, colour_scale, whole_numbers
from pipeline.training_metrics import finite

NIGHT_MEASURES = {
    "reward_mean": "mean reward",
    "echo_loss": "EchoClip loss, nats per token",
    "rl_loss": "RL loss",
    "grad_norm": "gradient norm",
}
# By section of the page: measure and title.
MEASURES = {
    "Learning": {
        "reward_mean": "mean reward",
        "zero_advantage_share": "share of groups with zero advantage",
        "entropy_mean": "entropy, nats per token",
        "rl_loss": "RL loss",
        "echo_loss": "EchoClip loss, nats per token",
        "loss": "whole loss",
    },
    "Gradients": {
        "grad_norm": "gradient norm",
        "rl_grad_norm": "gradient norm of the RL term",
        "echo_grad_norm": "gradient norm of the EchoClip term",
    },
    "Policy and engine": {
        "mismatch_kl": "KL(engine ‖ trainer), nats per token",
        "logprob_gap": "greatest log-prob difference, nats",
        "policy_lag": "policy lag of the rollouts, optimizer steps",
        "ratio_mean": "mean ratio π / π_old",
        "clip_share": "share of tokens with a clipped ratio",
        "num_refills": "batches of prompts taken beyond the first",
    },
    "EchoClips": {
        "num_clips": "EchoClips in a step",
        "num_clip_tokens": "their tokens",
        "num_retired_clips": "EchoClips retired",
        "clip_lag_mean": "their mean policy lag, optimizer steps",
        "clip_lag_max": "their greatest policy lag",
        "echo_weight": "λ",
    },
    "Speed": {
        "tokens_per_second": "tokens / s",
        "padding_share": "padding share",
        "seconds": "seconds a step",
    },
}
MAX_POINTS = 1200  # in one chart
MAX_DOTTED = 60  # points of a line that are marked each

T = TypeVar("T")
Steps = Sequence[Mapping[str, Any]]


def night_charts(steps: Steps) -> list[Chart]:
    """The few charts that a night's report has of its training; none of a measure without a finite value."""
    charts = [
        measure_chart(title, name, {"": steps}, {"": NEUTRAL}) for name, title in NIGHT_MEASURES.items()
    ]
    return [chart for chart in charts if chart.spec]


def measure_chart(title: str, measure: str, runs: Mapping[str, Steps], colours: Mapping[str, str]) -> Chart:
    """A measure's values, with gaps where a step has none. Lone values and those of short lines are dots.

    Args:
        runs: steps by label.
        colours: of the labels.
    """
    rows = [row for label, steps in runs.items() for row in _line(label, steps, measure, len(runs))]
    frame = pl.DataFrame(
        rows, schema={"run": pl.String, "optim_step": pl.Int64, "value": pl.Float64, "dot": pl.Boolean}
    )
    base = alt.Chart(frame, height=130).encode(
        x=alt.X("optim_step:Q", title="optimizer step", axis=whole_numbers(), scale=_steps_of(runs)),
        y=alt.Y(
            "value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4, format=".9~g")
        ),
        color=colour_scale("run", colours),
    )
    tooltip = [
        alt.Tooltip("optim_step:Q", title="optimizer step"),
        alt.Tooltip("value:Q", title=title, format=".4~g"),
    ]
    if len(runs) > 1:
        tooltip.insert(0, alt.Tooltip("run:N", title="training"))
    dots = base.mark_circle(size=28).encode(
        opacity=alt.condition(alt.datum.dot, alt.value(1), alt.value(0)), tooltip=tooltip
    )
    return card(title, "", frame, base.mark_line(strokeWidth=1.6) + dots)


def shares_chart(title: str, steps: Steps) -> Chart:
    """The share of each class of groups in each step, one column a step."""
    known = [step for step in steps if isinstance(step.get("classes"), dict)]
    shown = _thinned(known, MAX_POINTS // len(CLASS_COLOURS))
    rows = [row for step in shown for row in _column(step, len(known) // len(shown))]
    schema = {"start": pl.Float64, "end": pl.Float64, "optim_step": pl.Int64, "group_class": pl.String}
    frame = pl.DataFrame(rows, schema | {"share": pl.Float64, "low": pl.Float64, "high": pl.Float64})
    axis = alt.Axis(format="%", tickCount=4)
    chart = (
        alt.Chart(frame, height=150)
        .mark_rect()
        .encode(
            x=alt.X("start:Q", title="optimizer step", axis=whole_numbers(), scale=alt.Scale(nice=False)),
            x2="end:Q",
            y=alt.Y("low:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=axis),
            y2="high:Q",
            color=colour_scale("group_class", CLASS_COLOURS),
            tooltip=[
                alt.Tooltip("optim_step:Q", title="optimizer step"),
                alt.Tooltip("group_class:N", title="class"),
                alt.Tooltip("share:Q", format=".1%"),
            ],
        )
    )
    note = "Only mixed groups move the policy gradient."
    return card(title, note, frame, chart, "No group was sampled.", CLASS_COLOURS)


def _column(step: Mapping[str, Any], width: int) -> Iterator[dict[str, Any]]:
    """A step's shares, one on top of the other. None below 0, or beyond all groups."""
    high = 0.0
    start = step["optim_step"] - 0.5
    for name in CLASS_COLOURS:
        share = finite(step["classes"], name)
        if share is not None and 0 < share <= 1.001 - high:
            low, high = high, min(1.0, high + share)
            yield {
                "start": start, "end": start + width, "optim_step": step["optim_step"],
                "group_class": name, "share": share, "low": low, "high": high,
            }  # fmt: skip


def _steps_of(runs: Mapping[str, Steps]) -> alt.Scale:
    """All charts of a page begin and end at the same steps."""
    numbers = [step["optim_step"] for steps in runs.values() for step in steps]
    return alt.Scale(nice=False, domain=[min(numbers, default=0), max(numbers, default=1)])


def _line(label: str, steps: Steps, measure: str, num_runs: int) -> list[dict[str, Any]]:
    """The points of a line, one without a value for each gap; none if no step has a value."""
    values: list[tuple[int, float | None]] = []
    for step in steps:
        if values and step["optim_step"] > values[-1][0] + 1:
            values.append((values[-1][0] + 1, None))  # its step was left out
        values.append((step["optim_step"], finite(step, measure)))
    num_finite = sum(value is not None for _, value in values)
    if not num_finite:
        return []
    if num_finite > MAX_POINTS // num_runs:
        values = _thinned(values, MAX_POINTS // num_runs)
    around = [None, *(value for _, value in values), None]
    return [
        {
            "run": label,
            "optim_step": optim_step,
            "value": value,
            "dot": num_finite <= MAX_DOTTED or (before is None and after is None),
        }
        for (optim_step, value), before, after in zip(values, around, around[2:], strict=False)
        if value is not None or before is not None  # one gap is enough
    ]


def _thinned(items: list[T], limit: int) -> list[T]:
    """Every k-th item, so that at most `limit` remain."""
    return items[:: -(-len(items) // limit)] if len(items) > limit else items
