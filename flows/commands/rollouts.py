"""`echomine import` and `echomine score`: rollouts from elsewhere, and the entropies they lack."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.group import EXAMPLE, Commands, echomine
from flows.commands.output import note, print_counts
from flows.options import common_options, json_option, section_options
from pipeline.config import ScoreConfig, load_config
from pipeline.errors import FormatError

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


@import_.command(
    "rollouts",
    short_help="Import dumps of rollouts.",
    epilog=EXAMPLE + "echomine import rollouts dump.parquet --format canonical --tokenizer data/arith/model",
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format", type=click.Choice(["canonical"]), default="canonical", show_default=True, expose_value=False
)
@click.option(
    "--tokenizer", required=True, type=click.Path(path_type=Path), help="a tokenizer or model folder"
)
@common_options
@json_option
def import_rollouts(
    files: tuple[Path, ...], tokenizer: Path, lake: Path, config: Path | None, as_json: bool
) -> None:
    """Import dumps of rollouts; rows that cannot enter go to quarantine with the reason (exit code 2)."""
    load_config(config)
    from flows.progress import bar
    from pipeline.formats.canonical import check_files, import_canonical
    from pipeline.lake import Lake
    from pipeline.tokenization import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    check_files(files)
    opened = Lake.create(lake)
    with bar("importing rows", None) as update:
        done = import_canonical(opened, files, loaded, update)
    print_counts(as_json, asdict(done))
    if done.refused:
        raise _refused(opened, done, files)


def _refused(lake: Lake, done: Ingested, files: tuple[Path, ...]) -> FormatError:
    """The rest is in the lake; still, rows that were refused are the user's to know of."""
    with lake.reader() as reader:
        first = reader.rows(
            """
            select source, reason from quarantine
            where list_contains($names, regexp_replace(source, ':[0-9]+$', ''))
            order by created_at desc, source
            limit 1
            """,
            {"names": [path.name for path in files]},
        )[0]
    total = done.written + done.known + done.refused
    were = "was" if done.refused == 1 else "were"
    return FormatError(
        f"{done.refused} of {total} rows {were} refused, such as "
        f"{first['source']}: {first['reason']}. The others are in the lake; mend the refused and import "
        'again (see `echomine sql "select source, reason from quarantine"`).'
    )


@echomine.command(
    short_help="Compute the entropies that rollouts lack.",
    epilog=EXAMPLE + "echomine score --model data/arith/model",
)
@common_options
@json_option
@click.option("--model", help="arith, smollm2, or a Hugging Face model folder; default: the config's")
@click.option("--run", "run_id", help="only rollouts of this run")
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
    from flows.progress import bar
    from pipeline import scoring
    from pipeline.lake import Lake
    from pipeline.models import load_model, model_folder, policy_of
    from pipeline.tokenization import load_tokenizer

    folder, opened = model_folder(settings.model), Lake.open(lake)
    policy = policy_of(folder, settings.model, load_tokenizer(folder))
    selection = scoring.Selection(run_id, rescore)
    waiting = scoring.num_waiting(opened, policy, selection)
    loaded = load_model(folder, settings.engine.device, settings.engine.dtype)
    with bar("scoring rollouts", waiting) as update:
        done = scoring.score(opened, loaded, policy, selection, settings.score.batch_tokens, update)
    print_counts(as_json, {name: value for name, value in asdict(done).items() if value is not None})
    if done.other_tokenizer or done.unreadable:
        note(
            f"{done.other_tokenizer + done.unreadable} rollouts still wait: {done.other_tokenizer} are of "
            "another tokenizer (give the model that sampled them), "
            f"{done.unreadable} have no prompt or do not fit the context of {settings.model}."
        )
    if done.batch_tokens is not None:
        note(f"Memory ran out, so passes were made smaller. Set score.batch_tokens to {done.batch_tokens}.")
