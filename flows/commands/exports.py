"""`echomine export`: mined clips in the forms that trainers read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flows.commands.group import EXAMPLE, Commands, echomine
from flows.commands.output import counted, print_json
from flows.options import (
    chosen_tokenizer,
    common_options,
    json_option,
    section_options,
    snapshot_option,
    tokenizer_option,
)
from pipeline.config import ExportConfig, NightlyConfig, load_config
from pipeline.errors import NothingToMine

if TYPE_CHECKING:
    from pipeline.exports.core import Form

F = TypeVar("F", bound=Callable[..., Any])


@echomine.group(
    cls=Commands,
    short_help="Write mined clips for training.",
    epilog=EXAMPLE + "echomine export shards data/shards",
)
def export() -> None:
    """Write mined clips for training, each form for its readers."""


def _export_options(function: F) -> F:
    """The folder and what every form is asked for; the function gets them as one mapping."""
    for option in (
        snapshot_option,
        click.option("--mining", "mining_id", help="which mining's clips; default: the newest"),
        section_options(ExportConfig),
        json_option,
        common_options,
        click.argument("folder", type=click.Path(path_type=Path)),
    ):
        function = option(function)
    return function


@export.command(
    short_help="Parquet shards of token ids, for `echomine train`.",
    epilog=EXAMPLE + "echomine export shards data/shards --exclude-prompts eval.jsonl --max-tokens 4096",
)
@_export_options
def shards(**given: Any) -> None:
    """Parquet shards of EchoClips with a manifest; FOLDER/latest.json names the newest export."""
    from pipeline.exports.shards import SHARDS

    _export(given, lambda _: SHARDS)


@export.command(
    short_help="verl's prompt Parquet with a `target`, for LUFFY and EchoRL.",
    epilog=EXAMPLE + "echomine export luffy data/luffy --tokenizer data/arith/model",
)
@_export_options
@tokenizer_option
def luffy(tokenizer: Path | None, **given: Any) -> None:
    """verl's prompt Parquet with each clip's text as `target`, for LUFFY and EchoRL."""
    from pipeline.exports.luffy import luffy as form

    _export(given, lambda settings: form(chosen_tokenizer(tokenizer, settings)))


@export.command(
    short_help="Chat messages as JSON lines, for fine-tuning scripts.",
    epilog=EXAMPLE + "echomine export sft data/sft --tokenizer data/arith/model",
)
@_export_options
@tokenizer_option
def sft(tokenizer: Path | None, **given: Any) -> None:
    """Chat messages as JSON lines, the last one the clip, after which a chat template will end the turn."""
    from pipeline.exports.sft import sft as form

    _export(given, lambda settings: form(chosen_tokenizer(tokenizer, settings)))


@export.command(
    "prime-rl",
    short_help="Training samples with `ce_weights`, for prime-rl.",
    epilog=EXAMPLE + "echomine export prime-rl data/prime --clips-per-shard 16 --echo-weight 0.001",
)
@_export_options
@click.option("--echo-weight", type=float, help="λ, the weight of the EchoClip term [0.001]")
def prime_rl(echo_weight: float | None, **given: Any) -> None:
    """Training samples of prime-rl. The clips of one file make, in one step, the EchoClip loss times λ."""
    from pipeline.exports.prime_rl import prime_rl as form

    _export(
        given,
        lambda settings: form(settings.train.echo_weight),
        {"train": {"echo_weight": echo_weight}},
    )


@export.command(
    short_help="Prompts and clips as text and as tokens, for TRL's SFTTrainer.",
    epilog=EXAMPLE + "echomine export trl data/trl --tokenizer data/arith/model",
)
@_export_options
@tokenizer_option
def trl(tokenizer: Path | None, **given: Any) -> None:
    """Prompts and clips as Parquet, as text and as the tokens that were sampled, for TRL's SFTTrainer."""
    from pipeline.exports.trl import trl as form

    _export(given, lambda settings: form(chosen_tokenizer(tokenizer, settings)))


@export.command(
    short_help="A folder with a card, for `datasets.load_dataset`.",
    epilog=EXAMPLE + "echomine export hf data/hf --tokenizer data/arith/model",
)
@_export_options
@tokenizer_option
def hf(tokenizer: Path | None, **given: Any) -> None:
    """A folder with a card; `datasets.load_dataset` opens the folder that is printed."""
    from pipeline.exports.hf import hf as form

    _export(given, lambda settings: form(chosen_tokenizer(tokenizer, settings)))


def _export(
    given: dict[str, Any],
    form: Callable[[NightlyConfig], Form],
    overrides: dict[str, Any] | None = None,
) -> None:
    """Reads the settings, writes the export and says what is in it.

    Args:
        given: the options of `_export_options`.
        form: how the settings want the clips laid out.
        overrides: of settings beside those of the export.
    """
    names = ("lake", "folder", "config", "as_json", "mining_id", "snapshot")
    lake, folder, config, as_json, mining_id, snapshot = (given.pop(name) for name in names)
    settings = load_config(config, {"export": given, **(overrides or {})})
    from pipeline.exports.core import export_clips
    from pipeline.lake import Lake

    done = export_clips(Lake.open(lake), folder, form(settings), settings.export, mining_id, snapshot)
    if as_json:
        print_json({"folder": str(done.folder), **done.manifest})
    else:
        click.echo(f"{done.clips} clips in {done.folder}; left out: {counted(done.dropped)}")
    if not done.clips:
        raise NothingToMine("No clip was left to export. The counts say which rule left out what.")
