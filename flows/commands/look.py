"""`echomine report` and `audit`: looking at what is there."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from flows.commands.group import EXAMPLE, echomine
from flows.commands.output import print_json
from flows.options import common_options, json_option, section_options, snapshot_option
from pipeline.config import MiningConfig, load_config


@echomine.command(
    short_help="Write a night's report again.",
    epilog=EXAMPLE + "echomine report --night 2026-05-31",
)
@common_options
@json_option
@click.option("--night", type=click.DateTime(["%Y-%m-%d"]), help="which night; default: the newest")
@snapshot_option
def report(
    lake: Path, config: Path | None, as_json: bool, night: datetime | None, snapshot: int | None
) -> None:
    """Write a night's report again and say where it is."""
    load_config(config)
    from pipeline.lake import Lake
    from pipeline.night_report import run_of_night, write_night_report

    opened = Lake.open(lake)
    run_id = run_of_night(opened, night.date() if night else None)
    path = write_night_report(opened, run_id, snapshot)
    if as_json:
        print_json({"run_id": run_id, "report": str(path)})
    else:
        click.echo(path)


@echomine.command(
    short_help="What share of a dump's tokens taught nothing.",
    epilog=EXAMPLE + "echomine audit dump.parquet --tokenizer data/arith/model",
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="a tokenizer or model folder; default: the configured model's",
)
@click.option("--config", type=click.Path(path_type=Path), help="a TOML file with settings")
@json_option
@section_options(MiningConfig)
def audit(
    files: tuple[Path, ...], tokenizer: Path | None, config: Path | None, as_json: bool, **options: Any
) -> None:
    """Count a training's groups by class, and what its zero-advantage groups cost, from canonical dumps.

    Nothing is kept: the lake of EchoMine is neither read nor written.
    """
    settings = load_config(config, {"mining": options})
    from flows.answers import print_audit
    from flows.progress import bar
    from pipeline.audit import audit as audit_dumps
    from pipeline.models import model_folder
    from pipeline.tokenization import load_tokenizer

    loaded = load_tokenizer(tokenizer or model_folder(settings.model))
    with bar("reading rows", None) as update:
        found = audit_dumps(files, loaded, settings.mining, update)
    if as_json:
        totals = {
            "tokens": found.tokens,
            "zero_advantage_tokens": found.zero_advantage_tokens,
            "zero_advantage_share": found.zero_advantage_share,
        }
        print_json(asdict(found) | totals)
    else:
        print_audit(found)
