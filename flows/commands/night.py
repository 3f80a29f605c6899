"""`echomine nightly` and `echomine generate`: a night, or its first half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.commands.group import lake_command
from flows.commands.output import note, print_counts, print_json
from flows.options import night_options, night_settings, serve_options
from pipeline.config import load_config
from pipeline.errors import NothingToMine


@lake_command(
    short_help="Run a night: generate to train, and report.",
    example='echomine nightly --model arith --serve --cron "0 2 * * *"',
)
@night_options
@serve_options("start a night", cron="0 2 * * *")
def nightly(
    lake: Path,
    config: Path | None,
    as_json: bool,
    serve: bool,
    cron: str,
    **options: Any,
) -> None:
    """Run one night: generate, verify, commit, mine, export, train and report."""
    settings = load_config(config, night_settings(**options))
    from flows import embedded
    from pipeline.preflight import check_night

    check_night(settings, lake)
    if serve:
        embedded.serve_nightly(settings, lake.absolute(), cron)
        return
    result = embedded.run_nightly(settings, lake.absolute())
    if as_json:
        print_json(result)
    else:
        from rich.console import Console

        from flows.announce import print_summary

        print_summary(result, Console(highlight=False))
    if not result["mining"]["clips"]:
        raise NothingToMine("The night is done, and no clip was found in it.")


@lake_command(
    short_help="Generate, verify and commit a night's rollouts.",
    example="echomine generate --prompts 'reasoning_gym:chain_sum?size=64' --verifier reasoning_gym",
)
@night_options
def generate(lake: Path, config: Path | None, as_json: bool, **options: Any) -> None:
    """Generate, verify and commit a night's rollouts, without mining or training."""
    settings = load_config(config, night_settings(**options))
    from flows.progress import bar
    from pipeline import runs
    from pipeline.engines.choice import engine_kind
    from pipeline.generate import generate as next_batch
    from pipeline.generate import missing_groups, stop_generating
    from pipeline.ingest import Ingested
    from pipeline.preflight import check_night

    check_night(settings)
    run = runs.open_run(settings, lake)
    missing, done = missing_groups(run), Ingested()
    try:
        with bar("generating rollouts", len(missing) * settings.sampling.group_size) as update:
            while (staged := next_batch(run)) is not None:
                done += runs.commit(run, runs.verify(run, staged))
                update(done.written + done.known + done.refused)
    finally:
        stop_generating(run)
    counts: dict[str, Any] = {"run_id": run.run_id, "night": str(run.night), **done.counts()}
    print_counts(as_json, counts)
    if engine_kind(settings.engine) == "server":
        note(
            "Servers tell no entropies. Before these rollouts are mined, run "
            f"`echomine score --model {settings.model} --run {run.run_id}`, or `echomine nightly` to go on."
        )
    if done.refused:
        note(
            f"The verifier gave no reward for {done.refused} of these rollouts; their groups are incomplete "
            'and are not mined. See `echomine sql "select reason, row from quarantine"`.'
        )
