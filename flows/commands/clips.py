"""`echomine mine` and `train`: from groups to clips, and from clips to optimizer steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from flows.commands.group import lake_command
from flows.commands.output import counted, print_json
from flows.options import (
    chosen_tokenizer,
    model_option,
    night_settings,
    prompts_option,
    run_option,
    section_options,
    snapshot_option,
    tokenizer_option,
    verifier_option,
)
from flows.processes import check_devices, run_processes
from pipeline.config import MiningConfig, TrainConfig, load_config
from pipeline.errors import NothingToMine


@lake_command(
    short_help="Find the EchoClips of the lake's groups.",
    example="echomine mine --clips-per-group 2 --max-policy-lag 100 --json",
)
@section_options(MiningConfig)
@snapshot_option
@click.option(
    "--since-snapshot",
    type=click.IntRange(min=0),
    help="only groups with rollouts or changed rewards since, with all their rollouts",
)
@run_option("rollouts")
@tokenizer_option
@click.option(
    "--what-if",
    metavar="NAME=VALUE,…",
    help="write nothing: what the last mining (of --run) would have found with these settings instead",
)
def mine(
    lake: Path,
    config: Path | None,
    as_json: bool,
    snapshot: int | None,
    since_snapshot: int | None,
    run_id: str | None,
    tokenizer: Path | None,
    what_if: str | None,
    **options: Any,
) -> None:
    """Find the EchoClips of the lake's zero-advantage groups and record them.

    With --delimiter the successes are split into steps again, by the tokenizer that sampled them.
    """
    if what_if is not None:
        if since_snapshot is not None or any(value is not None for value in options.values()):
            raise click.UsageError(
                "Beside --what-if stand only --run, --snapshot and --tokenizer; put settings into it"
            )
        settings = load_config(config)
        _simulate(lake, what_if, snapshot, run_id, as_json, partial(chosen_tokenizer, tokenizer, settings))
        return
    settings = load_config(config, {"mining": options})
    if tokenizer is not None and settings.mining.delimiter is None:
        raise click.UsageError("--tokenizer is for splitting steps again: say where with --delimiter")
    from pipeline.lake import Lake
    from pipeline.mine import mine as mine_lake

    mined = mine_lake(
        Lake.open(lake),
        settings.mining,
        snapshot,
        since_snapshot,
        run_id,
        partial(chosen_tokenizer, tokenizer, settings),
    )
    if as_json:
        print_json(mined.as_dict())
    else:
        click.echo(f"mining {mined.mining_id} of snapshot {mined.snapshot}: {mined.clips} EchoClips")
        click.echo("groups   " + counted(mined.groups))
        click.echo("dropped  " + counted(mined.dropped))
    if not mined.clips:
        raise NothingToMine("Nothing to mine: no clip was kept. The counts say which rule dropped what.")


def _simulate(
    lake: Path,
    what_if: str,
    snapshot: int | None,
    run_id: str | None,
    as_json: bool,
    tokenizer: Callable[[], Any],
) -> None:
    from pipeline.lake import Lake
    from pipeline.what_if import parse_changes, simulate

    changes = parse_changes(what_if)
    simulation = simulate(Lake.open(lake), changes, snapshot, run_id, tokenizer)
    if as_json:
        print_json(simulation.as_dict())
    else:
        from flows.tables import print_simulation

        print_simulation(simulation)


@lake_command(
    short_help="Train on-policy beside the EchoClips of shards.",
    example="echomine train data/shards --optim-steps 20 --echo-weight 0.001",
)
@click.argument("shards", type=click.Path(path_type=Path), required=False)
@model_option
@prompts_option
@verifier_option
@click.option("--nproc", type=click.IntRange(min=1), default=1, help="processes, a GPU or CPU core each")
@section_options(TrainConfig)
@click.pass_context
def train(
    context: click.Context,
    /,
    shards: Path | None,
    lake: Path,
    config: Path | None,
    as_json: bool,
    model: str | None,
    prompts: str | None,
    verifier: str | None,
    nproc: int,
    **options: Any,
) -> None:
    """Train on-policy beside the EchoClips of SHARDS; its rollouts go into the lake.

    With --echo-source online the clips are of those rollouts, and SHARDS may be left out.
    """
    settings = load_config(config, {**night_settings(model, prompts, verifier=verifier), "train": options})
    if shards is None and settings.train.echo_source != "online":
        raise click.UsageError("Give the folder of SHARDS, or --echo-source online")
    from flows.progress import training_progress
    from pipeline.batch_room import check_clip_room
    from pipeline.lake import Lake
    from pipeline.models import is_on_cuda, model_folder
    from pipeline.preflight import check_night
    from pipeline.prompts import read_prompts
    from pipeline.records import Run
    from pipeline.shards import load_clips
    from pipeline.tokenization import load_tokenizer, tokenizer_hash
    from trainer.night import train_on_shards
    from trainer.ranks import joined_ranks

    check_night(settings, lake)
    check_devices(nproc, settings.engine.device)
    folder = model_folder(settings.model)
    if shards is not None:  # bad ones must not cost a new lake
        check_clip_room(load_clips(shards, tokenizer_hash(load_tokenizer(folder))), settings.train)
    opened = Lake.create(lake)
    if nproc > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(run_processes(nproc, context.find_root().obj))
    run = Run("train", settings.night or datetime.now(UTC).date(), "trainer")
    with (
        training_progress(settings.train.optim_steps) as progress,
        joined_ranks(is_on_cuda(settings.engine.device)) as ranks,
    ):
        result = train_on_shards(
            opened,
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
            ranks,
        )
    if not ranks.is_first:
        return
    if as_json:
        print_json(result)
    else:
        click.echo(f"{result['optim_steps']} optimizer steps; checkpoint in {result['checkpoint']}")
        if result["num_skipped"]:
            click.echo(f"{result['num_skipped']} of them skipped, as their loss or gradient was not finite")
        if result["echo_loss_before"] is None:
            click.echo(f"{result['num_clip_uses']} uses of EchoClips; none of shards")
        else:
            before, after = result["echo_loss_before"], result["echo_loss_after"]
            click.echo(f"EchoClip loss {before:.4f} → {after:.4f} nats/token")
