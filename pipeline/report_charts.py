"""The report's charts as Vega-Lite specifications. None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

from pipeline.report_text import printable

# One colour for a class wherever it is shown (Okabe and Ito's: they stay apart for colour-blind readers).
CLASS_COLOURS = {
    "all_success": "#009e73",
    "mixed": "#56b4e9",
    "all_fail": "#d55e00",
    "all_equal": "#d9a400",
    "incomplete": "#9aa0a6",
}
_ORDER = {name: place for place, name in enumerate(CLASS_COLOURS)}
OUTCOME_COLOURS = {"success": CLASS_COLOURS["all_success"], "failure": CLASS_COLOURS["all_fail"]}
NEUTRAL = "#7a86b8"
_ROW_PIXELS = 24
_PLOT_PIXELS = 220


@dataclass(frozen=True)
class Chart:
    """One card of the report.

    Attributes:
        legend: colour by name, shown above the chart.
        spec: a Vega-Lite specification with its data, None if there is nothing to show.
        empty: what to say then.
    """

    title: str
    note: str
    spec: dict[str, Any] | None
    empty: str = ""
    legend: Mapping[str, str] | None = None


def classes_charts(by_night: pl.DataFrame, by_version: pl.DataFrame) -> list[Chart]:
    """The class shares of each night and of each policy version, as two charts of one height."""
    num_bars = max(1, by_night["night"].n_unique(), by_version["policy_version"].n_unique())
    height = min(_PLOT_PIXELS, _ROW_PIXELS * num_bars)
    return [
        _classes_chart(
            by_night, "night", "night_share", height, "Group classes by night",
            "Sampled groups of this model. Only mixed groups move the policy gradient.",
        ),
        _classes_chart(
            by_version, "policy_version", "version_share", height, "Group classes by policy version",
            "Sampled and on-policy groups of this model, by optimizer steps.",
        ),
    ]  # fmt: skip


def _classes_chart(rows: pl.DataFrame, by: str, share: str, height: int, title: str, note: str) -> Chart:
    """Shares of the group classes, one bar for each value of the column `by`, the newest on top."""
    bar_pixels = min(_ROW_PIXELS, height / max(1, rows[by].n_unique())) - 3
    frame = rows.with_columns(
        pl.col(by).cast(pl.String).alias("label"),
        pl.col(by).rank("dense", descending=True).alias("place"),
        pl.col("group_class").replace_strict(_ORDER, default=len(_ORDER)).alias("order"),
    ).select("label", "place", "group_class", "order", "num_groups", share)
    chart = (
        alt.Chart(frame, height=height)
        .mark_bar(size=bar_pixels)
        .encode(
            x=alt.X(
                f"{share}:Q",
                title="share of groups",
                axis=alt.Axis(format="%", tickCount=5),
                scale=alt.Scale(domain=[0, 1]),
            ),
            y=alt.Y("label:N", title=None, sort=alt.EncodingSortField("place", op="min")),
            color=colour_scale("group_class", CLASS_COLOURS),
            order="order:Q",
            tooltip=[
                alt.Tooltip("label:N", title=by.replace("_", " ")),
                alt.Tooltip("group_class:N", title="class"),
                alt.Tooltip("num_groups:Q", title="groups", format=",d"),
                alt.Tooltip(f"{share}:Q", title="share", format=".1%"),
            ],
        )
    )
    return card(title, note, rows, chart, "No groups yet.", CLASS_COLOURS)


def reward_chart(rows: pl.DataFrame) -> Chart:
    """Histogram of the run's rewards, coloured by the class of the rollout's group."""
    frame = rows.with_columns(
        pl.col("group_class").replace_strict(_ORDER, default=len(_ORDER)).alias("order")
    )
    chart = (
        alt.Chart(frame, height=_PLOT_PIXELS)
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X("bin_start:Q", title="reward", bin="binned"),
            x2="bin_end:Q",
            y=alt.Y("num_rollouts:Q", title="rollouts", stack="zero", axis=whole_numbers()),
            color=colour_scale("group_class", CLASS_COLOURS),
            order="order:Q",
            tooltip=[
                alt.Tooltip("bin_start:Q", title="from", format=".3~f"),
                alt.Tooltip("bin_end:Q", title="to", format=".3~f"),
                alt.Tooltip("group_class:N", title="class"),
                alt.Tooltip("num_rollouts:Q", title="rollouts", format=",d"),
            ],
        )
    )
    note = "Rollouts by task reward, coloured by the class of their group."
    return card("Rewards", note, rows, chart, "No rewards in this run.", CLASS_COLOURS)


def profile_chart(rows: pl.DataFrame) -> Chart:
    """Mean and quartiles of token entropy by relative position, successes apart from failures."""
    base = alt.Chart(rows, height=_PLOT_PIXELS).encode(
        x=alt.X("position:Q", title="position in the completion", axis=alt.Axis(format="%", tickCount=5)),
        color=colour_scale("outcome", OUTCOME_COLOURS),
    )
    tooltip = [
        alt.Tooltip("outcome:N"),
        alt.Tooltip("position:Q", format=".0%"),
        alt.Tooltip("mean_entropy:Q", title="mean", format=".3f"),
        alt.Tooltip("lower_quartile:Q", title="lower quartile", format=".3f"),
        alt.Tooltip("median:Q", format=".3f"),
        alt.Tooltip("upper_quartile:Q", title="upper quartile", format=".3f"),
        alt.Tooltip("num_tokens:Q", title="tokens", format=",d"),
    ]
    band = base.mark_area(opacity=0.18).encode(
        y=alt.Y("lower_quartile:Q", title="entropy, nats"), y2="upper_quartile:Q"
    )
    median = base.mark_line(strokeWidth=1, strokeDash=[4, 3]).encode(y="median:Q")
    mean = base.mark_line(strokeWidth=2.5).encode(y="mean_entropy:Q")
    touch = base.mark_point(size=90, opacity=0, filled=True).encode(y="mean_entropy:Q", tooltip=tooltip)
    chart = alt.layer(band, median, mean, touch)
    note = "Token entropy: mean (line), median (dashes) and quartiles (band)."
    return card("Entropy along completions", note, rows, chart, "No entropies in this run.", OUTCOME_COLOURS)


def drops_chart(rows: pl.DataFrame) -> Chart:
    """What did not become a clip, by reason. A reason may quote a row, so it is model text."""
    frame = (
        rows.with_columns(
            pl.when(pl.col("stage") == "quarantine")
            .then(pl.lit("quarantine: ") + pl.col("reason"))
            .otherwise(pl.col("reason"))
            .map_elements(printable, return_dtype=pl.String)
            .alias("label")
        )
        .select("label", "num_dropped")
        .sort("num_dropped", descending=True)
    )
    bars = alt.Chart(frame, height=_ROW_PIXELS * max(1, frame["label"].n_unique())).encode(
        x=alt.X("num_dropped:Q", title="dropped", axis=whole_numbers()),
        y=alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=320)),
        tooltip=[
            alt.Tooltip("label:N", title="reason"),
            alt.Tooltip("num_dropped:Q", title="dropped", format=",d"),
        ],
    )
    chart = bars.mark_bar(color=NEUTRAL) + bars.mark_text(align="left", dx=4).encode(
        text=alt.Text("num_dropped:Q", format=",d")
    )
    note = "Candidate clips by the rule that dropped them (unscored: groups), and rollouts put in quarantine."
    return card("Drops by reason", note, rows, chart, "Nothing was dropped.")


def whole_numbers() -> alt.Axis:
    # Vega sets ticks between small counts, and its format would round them.
    return alt.Axis(tickCount=6, format=",d", labelExpr="datum.value % 1 ? '' : datum.label")


def colour_scale(field: str, colours: Mapping[str, str]) -> alt.Color:
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color(f"{field}:N", scale=scale, legend=None)


def card(
    title: str,
    note: str,
    rows: pl.DataFrame,
    chart: alt.Chart | alt.LayerChart | alt.FacetChart,
    empty: str = "",
    legend: Mapping[str, str] | None = None,
) -> Chart:
    if rows.is_empty():
        return Chart(title, note, None, empty)
    spec: dict[str, Any] = chart.properties(
        width="container",
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        background="transparent",
        description=title,
        config=_config(),
    ).to_dict()
    del spec["$schema"]  # an address, and the page needs none
    return Chart(title, note, spec, empty, legend)


def _config() -> alt.Config:
    return alt.Config(
        font="system-ui, sans-serif",
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(
            labelFontSize=11,
            titleFontSize=11,
            titleFontWeight="normal",
            titlePadding=8,
            domain=False,
            ticks=False,
        ),
    )
