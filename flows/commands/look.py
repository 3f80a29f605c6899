"""`echomine report` and `audit`: looking at what is there."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from flows.commands.group import EXAMPLE, echomine, lake_command
from flows.commands.output import note, print_json
from flows.options import (
    config_option,
    format_option,
    json_option,
    night_option,
    section_options,
    snapshot_option,
)
from pipeline.config import MiningConfig, load_config


@lake_command(
    short_help="Write a night's report again, or plot trainings.",
    example="echomine report --train training-5d1c6f03a2b94e77",
)
@night_option("which night; default: the newest")
@snapshot_option
@click.option(
    "--train",
    "trainings",
    metavar="RUN",
    multiple=True,
    help="plot the metrics of a training, given by its id or folder; several times: in one page",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="with --train: where to write the page; default: report.html in the first training's folder",
)
def report(
    lake: Path,
    config: Path | None,
    as_json: bool,
    night: datetime | None,
    snapshot: int | None,
    trainings: tuple[str, ...],
    html: Path | None,
) -> None:
    """Write a night's report again and say where it is.

    With --train it is a page of a training's metrics instead, which may still be running.
    """
    load_config(config)
    if trainings:
        if night is not None or snapshot is not None:
            raise click.UsageError("--night and --snapshot are of a night's report, --train is of a training")
        _report_trainings(lake, trainings, html, as_json)
        return
    if html is not None:
        raise click.UsageError("--html goes with --train: a night's report lies in its run's folder")
    from pipeline.lake import Lake
    from pipeline.night_report import run_of_night, write_night_report

    opened = Lake.open(lake)
    run_id = run_of_night(opened, night.date() if night else None)
    path = write_night_report(opened, run_id, snapshot)
    if as_json:
        print_json({"run_id": run_id, "report": str(path)})
    else:
        click.echo(path)


def _report_trainings(lake: Path, trainings: tuple[str, ...], html: Path | None, as_json: bool) -> None:
    from pipeline.training_metrics import find_training
    from pipeline.training_report import write_training_report

    folders = list(dict.fromkeys(find_training(lake, name) for name in trainings))
    path = write_training_report(folders, html or folders[0] / "report.html")
    if as_json:
        print_json({"trainings": [str(folder) for folder in folders], "report": str(path)})
    else:
        click.echo(path)


@echomine.command(
    short_help="What a dump's groups taught, and what trainers made of them.",
    epilog=EXAMPLE + "echomine audit dump.parquet --tokenizer data/arith/model --html audit.html",
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="a tokenizer or model folder; without it no EchoClips are counted",
)
@format_option
@click.option("--html", type=click.Path(path_type=Path), help="write the audit as a page, too")
@config_option
@json_option
@section_options(MiningConfig)
def audit(
    files: tuple[Path, ...],
    tokenizer: Path | None,
    format_name: str | None,
    html: Path | None,
    config: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Count a training's groups by class, what its zero-advantage groups cost, and which of them the rules of
    other trainers take for signal.

    A group and a reward in each row are enough. Nothing is kept: the lake of EchoMine is neither read nor
    written.
    """
    settings = load_config(config, {"mining": options})
    from flows.audit_table import audit_json, print_audit
    from flows.progress import bar
    from pipeline.audits.core import audit as audit_dumps
    from pipeline.audits.page import write_audit_page
    from pipeline.tokenization import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    with bar("reading rows", None) as update:
        found = audit_dumps(files, loaded, settings.mining, update, format_name)
    if as_json:
        print_json(audit_json(found))
    else:
        print_audit(found)
    if html is not None:
        note(f"The page is {write_audit_page(found, files, html)}")
