"""`echomine import` and `echomine score`: rollouts from elsewhere, and the entropies they lack."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.group import EXAMPLE, Commands, echomine, lake_command
from flows.commands.output import note, print_counts
from flows.options import MODELS, format_option, run_option, section_options
from pipeline.config import NightlyConfig, ScoreConfig, load_config
from pipeline.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from pipeline.ingest import Ingested
    from pipeline.lake import Lake


@echomine.group(
    "import",
    cls=Commands,
    short_help="Bring rollouts from elsewhere into the lake.",
    epilog=EXAMPLE + "echomine import rollouts dump.jsonl --tokenizer data/arith/model",
)
def import_() -> None:
    """Bring rollouts from elsewhere into the lake."""


@lake_command(
    short_help="Import dumps of rollouts.",
    example="echomine import rollouts dumps/*.jsonl --tokenizer data/arith/model --score-with arith",
    name="rollouts",
    group=import_,
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@format_option
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="folder of the tokenizer or model that sampled the dumps; default: the --score-with model's",
)
@click.option(
    "--score-with",
    metavar="MODEL",
    help="compute the entropies that the dumps lack: arith, smollm2 or a folder",
)
def import_rollouts(
    files: tuple[Path, ...],
    format_name: str | None,
    tokenizer: Path | None,
    score_with: str | None,
    lake: Path,
    config: Path | None,
    as_json: bool,
) -> None:
    """Import dumps of rollouts; rows that cannot enter go to quarantine with the reason (exit code 2)."""
    settings = load_config(config, {"model": score_with} if score_with else None)
    from flows.progress import bar
    from pipeline.imports import core as imports
    from pipeline.lake import Lake
    from pipeline.models import model_folder
    from pipeline.tokenization import load_tokenizer, tokenizer_hash

    dumps = imports.with_formats(files, format_name)
    imports.check_dumps(dumps)
    if tokenizer is None and score_with is None:
        raise ConfigError(
            "Steps are split by the text of their tokens, and no tokenizer is given. Give --tokenizer: the "
            "folder of the tokenizer (or the model) that sampled the dumps."
        )
    loaded = load_tokenizer(tokenizer or model_folder(settings.model))
    if score_with is not None and tokenizer is not None:
        own = load_tokenizer(model_folder(score_with))
        if tokenizer_hash(own) != tokenizer_hash(loaded):
            raise ConfigError(
                f"{score_with} has another tokenizer than {tokenizer}, so it cannot score these rollouts. "
                "Leave --tokenizer out, or score with the model that sampled them."
            )
    opened = Lake.create(lake)
    with bar("importing rows", None) as update:
        done = imports.import_rollouts(opened, dumps, loaded, update)
    for sentence in sorted(done.assumed):
        note(sentence)
    counts: dict[str, Any] = done.rows.counts()
    waiting = imports.num_unscored(opened, sorted(done.run_ids))
    if score_with is not None and waiting:
        counts |= {"scored": sum(_scored(opened, settings, run)["scored"] for run in sorted(done.run_ids))}
    elif waiting:
        note(
            f"{waiting} rollouts have no entropies yet, and `mine` passes over them. "
            f"Score them: echomine score --model MODEL --lake {lake}"
        )
    print_counts(as_json, counts)
    if done.rows.refused:
        raise _refused(done.rows)


def _refused(done: Ingested) -> FormatError:
    """What could enter is in the lake; still, rows that were refused are the user's to know of."""
    total = done.written + done.known + done.refused
    were = "was" if done.refused == 1 else "were"
    rest = (
        "The others are in the lake; mend the refused"
        if total > done.refused
        else "None was imported; mend them"
    )
    return FormatError(
        f"{done.refused} of {total} rows {were} refused, such as {done.refusal}. {rest} and import "
        'again (see `echomine sql "select source, reason from quarantine"`).'
    )


@lake_command(
    short_help="Compute the entropies that rollouts lack.",
    example="echomine score --model data/arith/model",
)
@click.option("--model", help=f"{MODELS}; default: the config's")
@run_option("rollouts")
@click.option(
    "--rescore", is_flag=True, help="also rollouts that have entropies, unless this model's scoring gave them"
)
@section_options(ScoreConfig)
def score(
    lake: Path,
    config: Path | None,
    as_json: bool,
    model: str | None,
    run_id: str | None,
    rescore: bool,
    **options: Any,
) -> None:
    """Compute the entropies (and log-probs) that rollouts lack, so that `mine` can rank their steps.

    With --rescore a newer policy judges all rollouts: their entropies become its own, and `mine` takes them
    together. Log-probs that are there stay, since they tell how the tokens were sampled.
    """
    settings = load_config(config, {"model": model, "score": options})
    from pipeline.lake import Lake
    from pipeline.scoring import check_run

    opened = Lake.open(lake)
    if run_id is not None:
        check_run(opened, run_id)
    print_counts(as_json, _scored(opened, settings, run_id, rescore))


def _scored(lake: Lake, settings: NightlyConfig, run_id: str | None, rescore: bool = False) -> dict[str, int]:
    """Scores with the configured model; what it left waiting is said, and the numbers returned."""
    from flows.progress import bar
    from pipeline import scoring
    from pipeline.models import load_model, model_folder, policy_of
    from pipeline.tokenization import load_tokenizer

    folder = model_folder(settings.model)
    policy = policy_of(folder, settings.model, load_tokenizer(folder))
    selection = scoring.Selection(run_id, rescore)
    waiting = scoring.num_waiting(lake, policy, selection)
    loaded = load_model(folder, settings.engine.device, settings.engine.dtype)
    with bar("scoring rollouts", waiting) as update:
        done = scoring.score(lake, loaded, policy, selection, settings.score.batch_tokens, update)
    for remark in done.remarks(settings.model):
        note(remark)
    return {name: value for name, value in asdict(done).items() if value is not None}
