"""The command `echomine`. Exit codes: 0 done, 2 a user's mistake, 3 nothing to mine, 1 a fault of ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from flows.options import common_options, json_option, section_options
from pipeline.config import ExportConfig, MiningConfig, TrainConfig, load_config
from pipeline.errors import ConfigError, EchoMineError, NothingToMine, nearest

EXAMPLE = "\b\nExample:\n  "


class Commands(click.Group):
    """Commands in the order of a night; a misspelled one is answered with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise ConfigError(f"There is no command `{args[0]}`: {nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def echomine() -> None:
    """Mines EchoClips from rollouts that taught nothing, and trains on them."""


@echomine.command(epilog=EXAMPLE + 'echomine nightly --model arith --serve --cron "0 2 * * *"')
@common_options
@json_option
@click.option("--model", help="arith, smollm2, or a Hugging Face model folder")
@click.option("--prompts", help="Parquet or JSONL file, or reasoning_gym:<task>?size=N&…")
@click.option("--max-prompts", type=int, help="only the first N prompts")
@click.option("--verifier", help="exact, math, reasoning_gym, or module:function")
@click.option("--night", type=click.DateTime(["%Y-%m-%d"]), help="the night's date; default: today in UTC")
@click.option("--serve", is_flag=True, help="keep running and start a night whenever --cron says")
@click.option("--cron", default="0 2 * * *", show_default=True, help="when a served night starts, in UTC")
def nightly(
    lake: Path,
    config: Path | None,
    as_json: bool,
    model: str | None,
    prompts: str | None,
    max_prompts: int | None,
    verifier: str | None,
    night: datetime | None,
    serve: bool,
    cron: str,
) -> None:
    """Run one night: generate, verify, commit, mine, export, train and report."""
    settings = load_config(config, _night_options(model, prompts, max_prompts, verifier, night))
    from flows import embedded

    if serve:
        embedded.serve_nightly(settings, lake.absolute(), cron)
        return
    result = embedded.run_nightly(settings, lake.absolute())
    if as_json:
        _print_json(result)
    else:
        from rich.console import Console

        from flows.announce import print_summary

        print_summary(result, Console(highlight=False))
    if not result["mining"]["clips"]:
        raise NothingToMine("The night is done, and no clip was found in it.")


def _night_options(
    model: str | None, prompts: str | None, max_prompts: int | None, verifier: str | None, night: datetime | None
) -> dict[str, Any]:
    return {
        "model": model,
        "prompts": prompts,
        "max_prompts": max_prompts,
        "night": night.date() if night else None,
        "verify": {"verifier": verifier},
    }


@echomine.command(epilog=EXAMPLE + "echomine generate --prompts 'reasoning_gym:chain_sum?size=64' --verifier reasoning_gym")
@common_options
@json_option
@click.option("--model", help="arith, smollm2, or a Hugging Face model folder")
@click.option("--prompts", help="Parquet or JSONL file, or reasoning_gym:<task>?size=N&…")
@click.option("--max-prompts", type=int, help="only the first N prompts")
@click.option("--verifier", help="exact, math, reasoning_gym, or module:function")
@click.option("--night", type=click.DateTime(["%Y-%m-%d"]), help="the night's date; default: today in UTC")
def generate(
    lake: Path,
    config: Path | None,
    as_json: bool,
    model: str | None,
    prompts: str | None,
    max_prompts: int | None,
    verifier: str | None,
    night: datetime | None,
) -> None:
    """Generate, verify and commit a night's rollouts, without mining or training."""
    settings = load_config(config, _night_options(model, prompts, max_prompts, verifier, night))
    from flows.progress import bar
    from pipeline import runs
    from pipeline.ingest import Ingested

    run = runs.open_run(settings, lake)
    batches, done = runs.missing_batches(run), Ingested()
    with bar("generating", len(batches)) as update:
        for number, prompt_ids in enumerate(batches, start=1):
            done += runs.commit(run, runs.verify(run, runs.generate(run, prompt_ids)))
            update(number)
    _report_counts(as_json, {"run_id": run.run_id, "night": str(run.night), **asdict(done)})


@echomine.group("import")
def import_() -> None:
    """Bring rollouts from elsewhere into the lake."""


@import_.command(
    "rollouts", epilog=EXAMPLE + "echomine import rollouts dump.parquet --format canonical --tokenizer data/arith/model"
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["canonical"]), default="canonical", show_default=True)
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="a tokenizer or model folder")
@common_options
@json_option
def import_rollouts(
    files: tuple[Path, ...], kind: str, tokenizer: Path, lake: Path, config: Path | None, as_json: bool
) -> None:
    """Import dumps of rollouts; rows that cannot enter go to quarantine with the reason."""
    load_config(config)
    from flows.progress import bar
    from pipeline.formats.canonical import import_canonical
    from pipeline.lake import Lake
    from pipeline.tokenization import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    with bar("importing rows", None) as update:
        done = import_canonical(Lake.create(lake), files, loaded, update)
    _report_counts(as_json, asdict(done))


@echomine.command(epilog=EXAMPLE + "echomine mine --clips-per-group 2 --max-policy-lag 100 --json")
@common_options
@json_option
@section_options(MiningConfig)
@click.option("--snapshot", type=int, help="mine the lake as of this snapshot")
@click.option("--since-snapshot", type=int, help="only groups touched since, with all their rollouts")
@click.option("--run", "run_id", help="only groups of this run")
def mine(
    lake: Path,
    config: Path | None,
    as_json: bool,
    snapshot: int | None,
    since_snapshot: int | None,
    run_id: str | None,
    **options: Any,
) -> None:
    """Find the EchoClips of the lake's zero-advantage groups and record them."""
    settings = load_config(config, {"mining": options}).mining
    from pipeline.lake import Lake
    from pipeline.mine import mine as mine_lake

    mined = mine_lake(Lake.open(lake), settings, snapshot, since_snapshot, run_id)
    if as_json:
        _print_json(mined.as_dict())
    else:
        click.echo(f"mining {mined.mining_id} of snapshot {mined.snapshot}: {mined.clips} EchoClips")
        click.echo("groups   " + _counted(mined.groups))
        click.echo("dropped  " + _counted(mined.dropped))
    if not mined.clips:
        raise NothingToMine("Nothing to mine: no clip was kept. The counts say which rule dropped what.")


@echomine.group()
def export() -> None:
    """Write mined clips for training."""


@export.command(epilog=EXAMPLE + "echomine export shards data/shards --exclude-prompts eval.jsonl --max-tokens 4096")
@click.argument("folder", type=click.Path(path_type=Path))
@common_options
@json_option
@section_options(ExportConfig)
@click.option("--mining", "mining_id", help="which mining's clips; default: the newest")
def shards(
    folder: Path, lake: Path, config: Path | None, as_json: bool, mining_id: str | None, **options: Any
) -> None:
    """Parquet shards of EchoClips with a manifest; FOLDER/latest.json names the newest export."""
    settings = load_config(config, {"export": options}).export
    from pipeline.lake import Lake
    from pipeline.shards import export_shards

    done = export_shards(Lake.open(lake), folder, settings, mining_id)
    if as_json:
        _print_json({"folder": str(done.folder), **done.manifest})
    else:
        click.echo(f"{done.clips} clips in {done.folder}; left out: {_counted(done.dropped)}")
    if not done.clips:
        raise NothingToMine("No clip was left to export.")


@echomine.command(epilog=EXAMPLE + "echomine train data/shards --optim-steps 20 --echo-weight 0.001")
@click.argument("shards", type=click.Path(path_type=Path))
@common_options
@json_option
@click.option("--model", help="arith, smollm2, or a Hugging Face model folder")
@click.option("--prompts", help="Parquet or JSONL file, or reasoning_gym:<task>?size=N&…")
@click.option("--verifier", help="exact, math, reasoning_gym, or module:function")
@section_options(TrainConfig)
def train(
    shards: Path,
    lake: Path,
    config: Path | None,
    as_json: bool,
    model: str | None,
    prompts: str | None,
    verifier: str | None,
    **options: Any,
) -> None:
    """Train on-policy (GRPO) beside the EchoClips of SHARDS; its rollouts go into the lake."""
    settings = load_config(config, {**_night_options(model, prompts, None, verifier, None), "train": options})
    from datetime import UTC

    from flows.progress import training_progress
    from pipeline.lake import Lake
    from pipeline.models import model_folder
    from pipeline.prompts import read_prompts
    from pipeline.records import Run
    from trainer.night import train_on_shards

    folder = model_folder(settings.model)
    run = Run("train", settings.night or datetime.now(UTC).date(), "trainer")
    with training_progress(settings.train.optim_steps) as progress:
        result = train_on_shards(
            Lake.create(lake),
            run,
            folder,
            settings.model,
            read_prompts(settings.prompts, settings.max_prompts),
            shards,
            settings.train,
            settings.sampling,
            settings.engine,
            settings.verify,
            settings.mining,
            progress,
        )
    if as_json:
        _print_json(result)
    else:
        click.echo(f"{result['optim_steps']} optimizer steps; checkpoint in {result['checkpoint']}")
        click.echo(f"EchoClip loss {result['echo_loss_before']} → {result['echo_loss_after']} nats/token")


@echomine.command(epilog=EXAMPLE + 'echomine sql "select group_class, count(*) from groups group by all"')
@click.argument("query")
@common_options
@click.option("--format", "form", type=click.Choice(["table", "csv", "json", "parquet"]), default="table", show_default=True)
@click.option("--snapshot", type=int, help="the lake as of this snapshot")
def sql(query: str, lake: Path, config: Path | None, form: str, snapshot: int | None) -> None:
    """Ask the lake anything; reading only. See `from snapshots` for its history."""
    load_config(config)
    from flows.answers import write_answer
    from pipeline.lake import Lake

    with Lake.open(lake).reader(snapshot) as reader:
        answer = reader.select(query)
    write_answer(answer, form)


@echomine.command(epilog=EXAMPLE + "echomine report --night 2026-05-31")
@common_options
@click.option("--night", type=click.DateTime(["%Y-%m-%d"]), help="which night; default: the newest")
def report(lake: Path, config: Path | None, night: datetime | None) -> None:
    """Write a night's report again and say where it is."""
    load_config(config)
    from pipeline.lake import Lake
    from pipeline.night_report import run_of_night, write_night_report

    opened = Lake.open(lake)
    click.echo(write_night_report(opened, run_of_night(opened, night.date() if night else None)))


@echomine.command(epilog=EXAMPLE + "echomine maintain")
@common_options
@json_option
def maintain(lake: Path, config: Path | None, as_json: bool) -> None:
    """Delete files that crashed writers left behind and that no snapshot names."""
    load_config(config)
    from pipeline.lake import Lake

    _report_counts(as_json, {"orphaned_files_deleted": Lake.open(lake).delete_orphans()})


@echomine.command(epilog=EXAMPLE + "echomine doctor --json")
@common_options
@json_option
def doctor(lake: Path, config: Path | None, as_json: bool) -> None:
    """Versions, devices, the engine, and the health of the lake."""
    settings = load_config(config)
    from pipeline.doctor import examine

    findings = examine(settings, lake)
    if as_json:
        _print_json({finding.name: {"ok": finding.ok, "finding": finding.text} for finding in findings})
    else:
        for finding in findings:
            click.echo(f"{'ok ' if finding.ok else 'BAD'}  {finding.name:<22} {finding.text}")
    if not all(finding.ok for finding in findings):
        raise EchoMineError("The doctor found problems; the lines marked BAD say where and what to do.")


def _counted(counts: Any) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


def _report_counts(as_json: bool, counts: dict[str, Any]) -> None:
    if as_json:
        _print_json(counts)
    else:
        click.echo(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()))


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, default=str))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; a user's mistake is one line on standard error."""
    try:
        echomine.main(args=None if arguments is None else list(arguments), prog_name="echomine", standalone_mode=False)
    except EchoMineError as error:
        click.echo(f"echomine: {error}", err=True)
        return error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "echomine"
        text = " ".join(error.format_message().split()).rstrip(".")
        click.echo(f"echomine: {text}. See `{where} --help`.", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("echomine: stopped. Start it again to go on; what was committed stays.", err=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
