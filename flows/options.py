"""Command-line options made from the config models, so that neither can know what the other does not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel

from pipeline import formats
from pipeline.config import DEFAULT_LAKE, EngineConfig, NightlyConfig

F = TypeVar("F", bound=Callable[..., Any])

MODELS = "arith, smollm2, or a Hugging Face model folder"
VERIFIERS = "exact, math, reasoning_gym, or module:function"

config_option = click.option("--config", type=click.Path(path_type=Path), help="a TOML file with settings")
model_option = click.option("--model", help=MODELS)
prompts_option = click.option("--prompts", help="Parquet or JSONL file, or reasoning_gym:<task>?size=N&…")
verifier_option = click.option("--verifier", help=VERIFIERS)


def section_options(model: type[BaseModel]) -> Callable[[F], F]:
    """One option for each field of a config section: `clips_per_group` becomes `--clips-per-group`."""

    def decorate(function: F) -> F:
        for name, info in reversed(model.model_fields.items()):
            kind = _plain_type(info.annotation)
            flag = "--" + name.replace("_", "-")
            default = "" if info.default is None else f" [{info.default}]"
            text = f"{info.description}{default if kind is not bool else ''}"
            if kind is bool:
                both = f"{flag}/--no-{flag.removeprefix('--')}"
                function = click.option(both, name, default=None, help=text)(function)
            else:
                function = click.option(flag, name, type=_click_type(kind), default=None, help=text)(function)
        return function

    return decorate


def _plain_type(annotation: Any) -> Any:
    """`int | None` without the None."""
    if get_origin(annotation) in (Union, type(int | None)):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _click_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice([str(choice) for choice in get_args(kind)])
    return click.Path(path_type=Path) if kind is Path else kind


def common_options(function: F) -> F:
    """`--lake` and `--config`, which every command on the lake has."""
    lake = click.option(
        "--lake",
        envvar="ECHOMINE_LAKE",
        type=click.Path(path_type=Path),
        default=DEFAULT_LAKE,
        show_default=True,
        help="the lake's folder (or set ECHOMINE_LAKE)",
    )
    return lake(config_option(function))


def night_option(text: str) -> Callable[[F], F]:
    """`--night`, a date; `text` is its help."""
    return click.option("--night", type=click.DateTime(["%Y-%m-%d"]), help=text)


def run_option(what: str) -> Callable[[F], F]:
    """`--run`, which every command has that can leave out all but one run's groups or rollouts."""
    return click.option("--run", "run_id", help=f"only {what} of this run")


def serve_options(what: str, cron: str) -> Callable[[F], F]:
    """`--serve` and `--cron`, which every command has that a schedule can start; `cron` is the default."""

    def decorate(function: F) -> F:
        serve = click.option("--serve", is_flag=True, help=f"keep running and {what} whenever --cron says")
        when = click.option("--cron", default=cron, show_default=True, help="when that is, in UTC")
        return serve(when(function))

    return decorate


def night_options(function: F) -> F:
    """What a night is made of: model, prompts, verifier and date."""
    for option in reversed(
        (
            model_option,
            prompts_option,
            click.option("--max-prompts", type=int, help="only the first N prompts"),
            click.option(
                "--engine",
                type=click.Choice(get_args(EngineConfig.model_fields["kind"].annotation)),
                help="what samples the rollouts; auto: vLLM where it is installed",
            ),
            verifier_option,
            night_option("the night's date; default: today in UTC"),
        )
    ):
        function = option(function)
    return function


def night_settings(
    model: str | None = None,
    prompts: str | None = None,
    max_prompts: int | None = None,
    engine: str | None = None,
    verifier: str | None = None,
    night: datetime | None = None,
) -> dict[str, Any]:
    """The options of `night_options`, nested like the config."""
    return {
        "model": model,
        "prompts": prompts,
        "max_prompts": max_prompts,
        "night": night.date() if night else None,
        "engine": {"kind": engine},
        "verify": {"verifier": verifier},
    }


def snapshot_option(function: F) -> F:
    """`--snapshot`, which every command has that reads the lake."""
    return click.option(
        "--snapshot",
        type=click.IntRange(min=0),
        help='the lake as of this snapshot; `echomine sql "from snapshots"` lists them',
    )(function)


def format_option(function: F) -> F:
    """`--format`, which every command has that reads dumps."""
    return click.option(
        "--format",
        "format_name",
        type=click.Choice(formats.NAMES),
        help="what wrote the files; default: by their content",
    )(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="print one JSON object on standard output")(
        function
    )


def tokenizer_option(function: F) -> F:
    return click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="a tokenizer or model folder; default: the configured model's",
    )(function)


def chosen_tokenizer(folder: Path | None, settings: NightlyConfig) -> Any:
    """The tokenizer of `tokenizer_option`."""
    from pipeline.tokenization import load_tokenizer

    if folder is None:
        from pipeline.models import model_folder

        folder = model_folder(settings.model)
    return load_tokenizer(folder)
