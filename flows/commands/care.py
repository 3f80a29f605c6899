"""`echomine init`, `maintain` and `doctor`: making a lake for several machines, keeping it sound."""

from __future__ import annotations

from pathlib import Path

import click

from flows.commands.group import EXAMPLE, echomine
from flows.commands.output import print_counts, print_json
from flows.options import common_options, json_option
from pipeline.config import load_config
from pipeline.errors import EchoMineError


@echomine.command(
    short_help="Make a lake for several machines.",
    epilog=EXAMPLE + "echomine init --lake /mnt/lake --catalog postgresql://miner@db.example/echomine",
)
@common_options
@json_option
@click.option(
    "--catalog",
    envvar="ECHOMINE_CATALOG",
    required=True,
    help="postgresql://user@host:5432/database, without a password (or set ECHOMINE_CATALOG)",
)
def init(lake: Path, config: Path | None, as_json: bool, catalog: str) -> None:
    """Make a lake whose catalog is a PostgreSQL database, for several machines that write to one lake.

    The password comes from PGPASSWORD or ~/.pgpass. Where the lake is there already, nothing changes. A lake
    for one machine needs no init: its catalog is a SQLite file.
    """
    load_config(config)
    from pipeline.lake import Lake

    made = Lake.create(lake, catalog)
    with made.reader() as reader:
        print_counts(as_json, {"lake": lake, "catalog": made.catalog.where, "snapshot": reader.snapshot})


@echomine.command(
    short_help="Delete what crashed writers left behind.",
    epilog=EXAMPLE + "echomine maintain",
)
@common_options
@json_option
def maintain(lake: Path, config: Path | None, as_json: bool) -> None:
    """Delete files that crashed writers left behind over an hour ago and that no snapshot names."""
    load_config(config)
    from pipeline.lake import Lake

    print_counts(as_json, {"orphaned_files_deleted": Lake.open(lake).delete_orphans()})


@echomine.command(
    short_help="Versions, devices, the engine, the lake's health.",
    epilog=EXAMPLE + "echomine doctor --json",
)
@common_options
@json_option
def doctor(lake: Path, config: Path | None, as_json: bool) -> None:
    """Versions, devices, the engine, and the health of the lake; exit code 2 if something is bad."""
    settings = load_config(config)
    from pipeline.doctor import examine

    findings = examine(settings, lake)
    if as_json:
        print_json({finding.name: {"ok": finding.ok, "finding": finding.text} for finding in findings})
    else:
        for finding in findings:
            click.echo(f"{'ok ' if finding.ok else 'BAD'}  {finding.name:<30} {finding.text}")
    bad = [finding.name for finding in findings if not finding.ok]
    if bad:
        raise EchoMineError(
            f"The doctor found {len(bad)} problems, first with {bad[0]}. Do what the lines marked BAD say."
        )
