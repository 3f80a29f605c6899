"""The charts of trainings: each measure over the optimizer steps, one line for each training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import altair as alt
import polars as pl

from pipeline.report_charts import CLASS_COLOURS, NEUTRAL, Chart, card, whole_numbers
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
        "clip_share": "share of tokens with a clipped ratio",
        "ratio_mean": "mean ratio π / π_old",
    },
    "Engine and trainer": {
        "mismatch_kl": "KL(engine ‖ trainer), nats per token",
        "logprob_gap": "greatest log-prob difference, nats",
        "policy_lag": "policy lag of the rollouts, optimizer steps",
    },
    "EchoClips": {
        "echo_weight": "λ",
        "num_clips": "EchoClips in a step",
        "num_retired_clips": "EchoClips retired",
        "clip_lag_mean": "mean policy lag of the EchoClips",
        "clip_lag_max": "greatest policy lag of the EchoClips",
    },
    "Speed": {
        "tokens_per_second": "tokens / s",
        "padding_share": "padding share",
        "num_completion_tokens": "completion tokens",
        "seconds": "seconds",
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
        x=alt.X("optim_step:Q", title="optimizer step", axis=whole_numbers(), scale=alt.Scale(nice=False)),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4)),
        color=alt.Color(
            "run:N", legend=None, scale=alt.Scale(domain=list(colours), range=list(colours.values()))
        ),
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
    shown = _thinned([step for step in steps if isinstance(step.get("classes"), dict)], MAX_POINTS // 4)
    width = max(1, len(steps) // max(1, len(shown)))
    rows = [
        {
            "start": step["optim_step"] - 0.5, "end": step["optim_step"] - 0.5 + width,
            "step": step["optim_step"], "group_class": name, "order": order, "share": share,
        }
        for step in shown
        for order, name in enumerate(CLASS_COLOURS)
        if (share := finite(step["classes"], name)) is not None and 0 <= share <= 1
    ]  # fmt: skip
    frame = pl.DataFrame(
        rows,
        schema={
            "start": pl.Float64, "end": pl.Float64, "step": pl.Int64,
            "group_class": pl.String, "order": pl.Int64, "share": pl.Float64,
        },
    )  # fmt: skip
    chart = (
        alt.Chart(frame, height=150)
        .mark_bar(binSpacing=0)
        .encode(
            x=alt.X("start:Q", title="optimizer step", axis=whole_numbers(), scale=alt.Scale(nice=False)),
            x2="end:Q",
            y=alt.Y(
                "share:Q", title=None, stack="zero", scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", tickCount=4),
            ),
            color=alt.Color(
                "group_class:N", legend=None,
                scale=alt.Scale(domain=list(CLASS_COLOURS), range=list(CLASS_COLOURS.values())),
            ),
            order="order:Q",
            tooltip=[
                alt.Tooltip("step:Q", title="optimizer step"),
                alt.Tooltip("group_class:N", title="class"),
                alt.Tooltip("share:Q", format=".1%"),
            ],
        )
    )  # fmt: skip
    note = "Only mixed groups move the policy gradient."
    return card(title, note, frame, chart, "No group was sampled.", CLASS_COLOURS)


def _line(label: str, steps: Steps, measure: str, num_runs: int) -> list[dict[str, Any]]:
    """The points of a line, one without a value for each gap; none if no step has a value."""
    values = [(step["optim_step"], finite(step, measure)) for step in steps]
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
