"""`echomine reverify` and `echomine forget`: what was stored is judged again, or is to be there no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.commands.group import lake_command
from flows.commands.output import note, print_counts, print_json
from flows.options import VERIFIERS, night_option, run_option
from pipeline.config import load_config
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.forget import Forgot
    from pipeline.forgetting import Forgetting
    from pipeline.reverify import Reverified
    from pipeline.withdrawal import TouchedShard


@lake_command(
    short_help="Judge stored completions again; withdraw false successes.",
    example="echomine reverify --verifier math --night 2026-05-31 --json",
)
@click.option("--verifier", help=f"{VERIFIERS}; default: each rollout's own, if built in")
@run_option("rollouts")
@night_option("only rollouts of this night")
@click.option("--prompt", "prompt_id", help="only rollouts of the prompt with this id")
def reverify(
    lake: Path,
    config: Path | None,
    as_json: bool,
    verifier: str | None,
    run_id: str | None,
    night: datetime | None,
    prompt_id: str | None,
) -> None:
    """Run verifiers again over stored completions, under the time limit of `verify.timeout_seconds`.

    Verdicts are written beside the old ones (table `verdicts`); the newest counts. Clips whose rollout is no
    success any more are withdrawn: no export, training or report uses them.
    """
    settings = load_config(config)
    from flows.answers import write_answer
    from flows.progress import bar
    from pipeline.lake import Lake
    from pipeline.query import Selection
    from pipeline.reverify import Scope
    from pipeline.reverify import reverify as reverify_lake
    from pipeline.sqlfiles import sql_file

    opened = Lake.open(lake)
    scope = Scope(run_id, night.date() if night else None, prompt_id)
    with bar("verifying rollouts", None) as update:
        done = reverify_lake(opened, settings.verify, scope, verifier, update)
    with opened.reader() as reader:
        disagreements = reader.table(sql_file("reports/disagreements_by_version"))
    if as_json:
        print_json({**asdict(done), "disagreements": disagreements.to_pylist()})
    else:
        print_counts(False, {name: value for name, value in asdict(done).items() if name != "shards"})
        if disagreements.num_rows:
            click.echo('Disagreements in the lake (`echomine sql "from disagreements"` lists them):')
            write_answer(Selection(disagreements.column_names, disagreements), "table")
        _print_shards(done.shards)
    _note_gaps(done)


def _note_gaps(done: Reverified) -> None:
    """What could not be judged, and what to do about it."""
    if done.failed:
        note(
            f"The verifier hung, died or raised on {done.failed} rollouts, which keep what they had and "
            'are asked again the next time. See `echomine sql "select rollout_id, error from verdicts '
            'where error is not null"`.'
        )
    if done.unknown_prompt:
        note(
            f"{done.unknown_prompt} rollouts are of prompts that the lake does not hold, so nothing "
            "tells what is right. Import them again with `prompt` and `ground_truth`."
        )
    if done.no_ground_truth:
        note(
            f"{done.no_ground_truth} rollouts are of prompts without a ground truth, which the verifier "
            "needs: nothing was written for them. Judge them with --verifier module:function, or import them "
            "with `ground_truth` into a new lake."
        )
    if done.no_verifier:
        note(
            f"{done.no_verifier} rollouts do not name a built-in verifier. Judge them with "
            "--verifier NAME or module:function."
        )


def _print_shards(shards: Sequence[TouchedShard]) -> None:
    for shard in shards:
        click.echo(
            f"shard {shard.path}: {shard.clips} clips; "
            + (
                "withdrawn.json beside it names them, and `echomine train` leaves them out"
                if shard.noticed
                else "it cannot be read or marked there: tell whoever holds a copy"
            )
        )
    if shards:
        note(
            "Copies of these shards elsewhere know nothing of it: copy withdrawn.json too, or export again. "
            "Other trainers do not read that file: export again for them."
        )


@lake_command(
    short_help="Remove prompts and all that came of them, for good.",
    example="echomine forget --prompt contaminated.jsonl --yes",
)
@click.option(
    "--prompt",
    "names",
    multiple=True,
    required=True,
    help="a prompt id, a file with an id on each line, or a prompt file (.jsonl, .parquet)",
)
@click.option("--yes", is_flag=True, help="do it; without it, say what would go")
def forget(lake: Path, config: Path | None, as_json: bool, names: tuple[str, ...], yes: bool) -> None:
    """Remove prompts with their rollouts, clips, verdicts and refused rows from every file of the lake.

    All older snapshots end with it, since they hold the bytes: time travel begins anew. Later imports and
    nights refuse the prompts. Says which exported shards hold their clips, and what has learned from these.
    """
    load_config(config)
    from pipeline.forget import forget as forget_prompts
    from pipeline.forgetting import find
    from pipeline.lake import Lake
    from pipeline.removal import refuse_other_catalogs

    opened = Lake.open(lake)
    refuse_other_catalogs(opened)
    if not yes:
        _say_what_would_go(find(opened, list(names)))
        raise ConfigError(
            "Nothing was removed. Give --yes to remove it for good; all older snapshots end with it."
        )
    done = forget_prompts(opened, list(names))
    if as_json:
        print_json(asdict(done))
        return
    print_counts(
        False, {"prompts forgotten": done.prompts, **{f"{n} removed": k for n, k in done.rows.items()}}
    )
    _print_shards(done.shards)
    _print_remains(done)
    if not any(done.rows.values()):
        note("The lake held nothing more of them. Imports and nights leave them out from now on.")


def _say_what_would_go(found: Forgetting) -> None:
    clips = sum(len(ids) for ids in found.clips.values())
    note(
        f"This would remove {len(found.keys['rollouts'])} rollouts of {len(found.prompt_ids)} prompts, "
        f"{clips} clips, {len(found.keys['quarantine'])} refused rows."
    )


def _print_remains(done: Forgot) -> None:
    for report in done.reports:
        click.echo(f"report {report}: deleted; `echomine report` writes it again")
    for path in done.set_aside:
        click.echo(f"file {path}: it was damaged and set aside, and may hold them; delete it yourself")
    for training in done.trainings:
        click.echo(
            f"training {training}: its checkpoint has learned from these clips; only you can discard it"
        )
