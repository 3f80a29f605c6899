"""`echomine import` and `echomine score`: rollouts from elsewhere, and the entropies they lack."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.commands.group import EXAMPLE, Commands, echomine
from flows.commands.output import note, print_counts
from flows.options import common_options, json_option
from pipeline.config import load_config
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
@click.option("--model", help="arith, smollm2, or a Hugging Face model folder: the one that sampled them")
def score(lake: Path, config: Path | None, as_json: bool, model: str | None) -> None:
    """Compute the entropies (and log-probs) that rollouts lack, so that `mine` can rank their steps."""
    settings = load_config(config, {"model": model})
    from flows.progress import bar
    from pipeline import scoring
    from pipeline.lake import Lake
    from pipeline.models import load_model, model_folder
    from pipeline.tokenization import load_tokenizer, tokenizer_hash

    folder, opened = model_folder(settings.model), Lake.open(lake)
    tokens = tokenizer_hash(load_tokenizer(folder))
    loaded = load_model(folder, settings.engine.device, settings.engine.dtype)
    with bar("scoring rollouts", None) as update:
        done = scoring.score(opened, loaded, tokens, update)
    print_counts(as_json, asdict(done))
    if done.other_tokenizer or done.unreadable:
        note(
            f"{done.other_tokenizer + done.unreadable} rollouts still wait: {done.other_tokenizer} are of "
            "another tokenizer (give the model that sampled them), "
            f"{done.unreadable} have no prompt or do not fit the context of {settings.model}."
        )
