"""The report of one night: a single HTML file that opens without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline import report_charts as charts
from pipeline.chart_page import chart_page
from pipeline.config import MiningConfig
from pipeline.errors import LakeError, MiningError
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.mine import NO_GROUPS, WHOLE_LAKE, recorded_settings
from pipeline.pages import write_page
from pipeline.report_clips import NUM_SHADES, clip_views
from pipeline.report_text import number, percent
from pipeline.sqlfiles import sql_file
from pipeline.training_charts import night_charts

LIMITS = {"num_bins": 20, "max_nights": 30, "max_versions": 30, "max_rollouts": 20_000, "max_reasons": 8}
NUM_CLIPS = 20


def write_report(
    lake: Lake,
    run_id: str,
    mining_id: str,
    tokenizer: Any,
    path: Path,
    timings: Mapping[str, float],
    training: Mapping[str, Any] | None = None,
    export_dropped: Mapping[str, int] | None = None,
    snapshot: int | None = None,
) -> Path:
    """Writes the report of a run and its mining, complete or not at all.

    Args:
        tokenizer: of the model that sampled; rollouts of another one are shown as token ids.
        timings: seconds by stage; `generate_seconds` gives the tokens per second.
        training: `metrics`: one mapping per optimizer step (optim_step, rl_loss, echo_loss, reward_mean,
            grad_norm; any may be missing or None).
        export_dropped: clips that the export left out, by reason.
        snapshot: of the lake, by default the newest.

    Returns:
        `path`.

    Raises:
        LakeError: the lake holds no rollouts of the run, or `path` cannot be written.
        MiningError: the lake holds no such mining.
    """
    with lake.reader(snapshot) as reader:
        mining = _mining(reader, mining_id)
        params = LIMITS | mining["params"] | {
            "run_id": run_id, "mining_id": mining_id, "num_clips": NUM_CLIPS
        }  # fmt: skip
        _classify(reader, params)
        reader.materialize_rows("export_drops", _drop_rows(export_dropped or {}))
        run = _run(reader, params)
        params |= {"model": run["model"], "night": run["night"]}
        clips = clip_views(reader.rows(sql_file("reports/best_clips"), params), tokenizer)
        cards = _cards(reader, params)
    metrics = list((training or {}).get("metrics") or [])
    page = chart_page(
        "report.html",
        run=run,
        mining=mining,
        figures=_figures(run, mining, timings),
        timings=timings,
        cards=cards,
        training=night_charts(metrics),
        clips=clips,
        shades=range(NUM_SHADES + 1),
    )
    return write_page(page, path)


def _mining(reader: Reader, mining_id: str) -> dict[str, Any]:
    """The mining's figures, and under `params` the settings that it classed groups with."""
    rows = reader.rows(sql_file("reports/mining_figures"), {"mining_id": mining_id})
    if not rows:
        raise MiningError(
            f"The lake in {reader.lake.folder} holds no mining {mining_id}. "
            "See `echomine sql \"from mining_runs\"` for those it has."
        )  # fmt: skip
    settings = MiningConfig(**recorded_settings(json.loads(rows[0]["config"])))
    return rows[0] | {"params": settings.model_dump()}


def _classify(reader: Reader, params: Mapping[str, Any]) -> None:
    """Classes all groups of the lake by the rules of this mining, so that nights compare."""
    reader.materialize_rows("touched_groups", NO_GROUPS)
    every_run = dict(params) | WHOLE_LAKE
    reader.materialize("group_classes", sql_file("mining/group_classes"), every_run)


def _drop_rows(dropped: Mapping[str, int]) -> pa.Table:
    columns = [pa.array(dropped.keys(), pa.string()), pa.array(dropped.values(), pa.int64())]
    return pa.table(columns, names=["reason", "num_dropped"])


def _run(reader: Reader, params: Mapping[str, Any]) -> dict[str, Any]:
    rows = reader.rows(sql_file("reports/run_figures"), params)
    if not rows:
        raise LakeError(
            f"The lake in {reader.lake.folder} holds no rollouts of run {params['run_id']}. "
            "See `echomine sql \"select distinct run_id from rollouts\"` for the runs it has."
        )  # fmt: skip
    return rows[0]


def _figures(
    run: Mapping[str, Any], mining: Mapping[str, Any], timings: Mapping[str, float]
) -> list[tuple[str, str, str]]:
    """(figure, name, meaning) of the row of key figures."""
    seconds = timings.get("generate_seconds")
    speed = run["num_tokens"] / seconds if seconds else None
    untaught = percent(run["num_zero_advantage_tokens"], run["num_tokens"])
    return [
        (
            number(run["num_groups"]),
            "groups",
            f"{number(run['num_zero_advantage_groups'])} with zero advantage",
        ),
        (number(run["num_rollouts"]), "rollouts", ""),
        (number(run["num_tokens"]), "tokens", "sampled in completions"),
        (untaught, "tokens that taught nothing", "in groups with zero advantage"),
        (number(mining["num_clips"]), "EchoClips", "mined from them"),
        (number(speed), "tokens / s", "generated"),
        (number(mining["clips_per_second"]), "clips / s", "mined"),
    ]


def _cards(reader: Reader, params: Mapping[str, Any]) -> list[charts.Chart]:
    def frame(report: str) -> pl.DataFrame:
        return pl.DataFrame(reader.table(sql_file(f"reports/{report}"), params))

    return [
        *charts.classes_charts(frame("classes_by_night"), frame("classes_by_version")),
        charts.reward_chart(frame("reward_histogram")),
        charts.profile_chart(frame("entropy_profile")),
        charts.drops_chart(frame("drops")),
    ]
