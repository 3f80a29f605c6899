"""The page of a training, made of metrics that somebody else wrote and opened in a real browser."""

from __future__ import annotations

import json
import re

import pytest
from test_report import HOSTILE_NAME, links_of, opened

from pipeline.errors import ConfigError
from pipeline.training_charts import MAX_POINTS, measure_chart, shares_chart
from pipeline.training_metrics import find_training, read_training
from pipeline.training_report import write_training_report

CLASSES = {"all_success": 0.25, "all_fail": 0.0, "all_equal": 0.0, "mixed": 0.75, "incomplete": 0.0}


def step(optim_step, **values):
    measures = {"reward_mean": 0.5, "grad_norm": 1.0, "tokens_per_second": 100.0, "echo_loss": None}
    return {"optim_step": optim_step, "skipped": False, "classes": CLASSES, **measures, **values}


def training(folder, lines, model="arith", objective="grpo"):
    folder.mkdir(parents=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    settings = {"model": model, "train": {"objective": objective, "echo_source": "online"}}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def points(chart):
    (rows,) = chart.spec["datasets"].values()
    return [(row["optim_step"], row["value"], row["dot"]) for row in rows]


def test_damaged_metrics_are_read_as_far_as_they_go_and_each_fault_is_said(tmp_path):
    lines = [
        step(0), step(1, reward_mean=float("nan"), grad_norm="1.0"), "[" * 100_000, "[1]", step(-1),
        step(1e3), step(True), step(10**400), step(2, reward_mean=10**400, classes=3, grad_norm=True),
        step(0, reward_mean=1.0),
        '{"optim_step": 3, "rew',
    ]  # fmt: skip
    read = read_training(training(tmp_path / "one", lines))
    assert [line["optim_step"] for line in read.steps] == [0, 1, 2]
    assert read.steps[0]["reward_mean"] == 1.0
    assert read.faults == [
        "The last line is cut off: the training is writing it, or was killed while it did.",
        "6 lines are left out, as no step stands there: first line 3.",
        "1 step is written more than once: the last is shown.",
        "4 values are not shown, as no finite number.",
    ]
    chart = measure_chart("reward", "reward_mean", {"one": read.steps}, {"one": "#000000"})
    assert [value for _, value, _ in points(chart)] == [1.0, None]
    assert shares_chart("classes", read.steps).spec is not None


def test_a_gap_stays_a_gap_and_a_long_line_is_thinned():
    short = [step(i, reward_mean=None if i in (2, 3) else float(i)) for i in (0, 1, 2, 3, 4, 7)]
    chart = measure_chart("reward", "reward_mean", {"": short}, {"": "#000000"})
    drawn = [(0, 0.0, True), (1, 1.0, True), (2, None, True), (4, 4.0, True), (5, None, True), (7, 7.0, True)]
    assert points(chart) == drawn
    long = [step(i, reward_mean=float(i)) for i in range(50_000)]
    rows = points(measure_chart("reward", "reward_mean", {"": long}, {"": "#000000"}))
    assert MAX_POINTS // 2 < len(rows) <= MAX_POINTS
    assert not any(dot for _, _, dot in rows)
    assert measure_chart("loss", "echo_loss", {"": short}, {"": "#000000"}).spec is None


def test_trainings_are_drawn_in_one_page_that_runs_and_fetches_nothing_of_theirs(chromium, tmp_path):
    bad = [step(0), step(1, reward_mean=HOSTILE_NAME, skipped=True), step(2, **{HOSTILE_NAME: 1.0})]
    folders = [
        training(tmp_path / "a" / "<script>x", bad, HOSTILE_NAME, HOSTILE_NAME),
        training(tmp_path / "b" / "<script>x", [step(0), step(1), step(2)]),
    ]
    path = write_training_report(folders, tmp_path / "page.html")
    page = opened(chromium, path, tmp_path / "profile")
    assert page.console == []
    assert page.title == "2 trainings · EchoMine"
    assert page.num_drawn == 5  # reward, gradient norm, tokens per second, and the classes of both
    assert page.dom.count("<script") == 6
    assert not [link for link in links_of(path.read_text()) if link]
    assert re.search(r"No step has a value of: .*EchoClip loss", page.dom)


def test_the_title_says_model_and_objective_and_the_figures_what_was_skipped(tmp_path):
    folder = training(
        tmp_path / "one", [step(0), step(1, skipped=True, reward_mean=None), ""], "arith", "dapo"
    )
    text = write_training_report([folder], tmp_path / "page.html").read_text()
    assert "<h1>arith · dapo</h1>" in text
    assert re.search(r"skipped<small>optim_step 1</small></dt><dd>1</dd>", text)
    (folder / "settings.json").write_text("[]")
    text = write_training_report([folder], tmp_path / "page.html").read_text()
    assert "<h1>unnamed model · unnamed objective</h1>" in text


def test_a_training_is_found_by_id_folder_and_metrics_and_more_than_eight_are_refused(tmp_path):
    folder = training(tmp_path / "runs" / "train" / "training-1", [step(0)])
    for name in ("training-1", str(folder), str(folder / "metrics.jsonl")):
        assert find_training(tmp_path, name) == folder
    with pytest.raises(ConfigError, match="9 trainings are more than the 8"):
        write_training_report([folder] * 9, tmp_path / "page.html")
