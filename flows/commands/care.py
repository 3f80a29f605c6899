"""`echomine init`, `maintain` and `doctor`: making a lake for several machines, keeping it sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flows.commands.group import lake_command
from flows.commands.output import print_counts, print_json
from flows.options import section_options, serve_options
from pipeline.config import MaintainConfig, load_config
from pipeline.errors import ConfigError, EchoMineError


@lake_command(
    short_help="Make a lake for several machines.",
    example="echomine init --lake /mnt/lake --catalog postgresql://miner@db.example/echomine",
)
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


@lake_command(
    short_help="Merge small files, expire snapshots, delete orphans.",
    example="echomine maintain --dry-run",
)
@section_options(MaintainConfig)
@click.option("--dry-run", is_flag=True, help="say what would be done, and do nothing")
@serve_options("do this", cron="0 5 * * *")
def maintain(
    lake: Path,
    config: Path | None,
    as_json: bool,
    dry_run: bool,
    serve: bool,
    cron: str,
    **options: Any,
) -> None:
    """Merge small data files, expire snapshots that nobody names, delete files that no snapshot names.

    Others may read and write meanwhile. What merging and expiring replaced is deleted after its grace, by a
    later `maintain`.
    """
    settings = load_config(config, {"maintain": options}).maintain
    from pipeline.lake import Lake
    from pipeline.maintenance import maintain as maintain_lake

    opened = Lake.open(lake)
    if serve:
        if dry_run:
            raise ConfigError("--serve does what --dry-run would only say. Leave one of them out.")
        from flows.embedded import serve_maintain

        serve_maintain(settings, opened.folder, cron)
        return
    print_counts(as_json, maintain_lake(opened, settings, dry_run).as_dict())


@lake_command(
    short_help="Versions, devices, the engine, the lake's health.",
    example="echomine doctor --json",
)
@click.option(
    "--set-aside",
    is_flag=True,
    help="move damaged data files into damaged/ of the lake and go on without them",
)
def doctor(lake: Path, config: Path | None, as_json: bool, set_aside: bool) -> None:
    """Versions, devices, the engine, and the health of the lake; exit code 2 if something is bad.

    With --set-aside the lake goes on without the data files that are damaged or missing. Their rows are lost
    until they are imported or mined again, so first restore what a backup has.
    """
    settings = load_config(config)
    from pipeline.doctor import examine

    findings = examine(settings, lake, set_aside)
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
