"""The command `echomine` itself: what commands belong to it, and how they are called and listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from flows.options import common_options, json_option
from pipeline.errors import ConfigError, nearest

EXAMPLE = "\b\nExample:\n  "  # an epilog; \b keeps click from joining the lines


class Commands(click.Group):
    """Commands in the order of a night; a misspelled one is answered with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            path = " ".join([*ctx.command_path.split()[1:], args[0]])
            raise ConfigError(f"There is no command `{path}`: {nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EXAMPLE + "echomine nightly --model arith",
)
@click.version_option(package_name="echomine", message="echomine %(version)s")
def echomine() -> None:
    """Mines EchoClips from rollouts that taught nothing, and trains on them."""


def lake_command(
    short_help: str, example: str, name: str | None = None, group: click.Group = echomine
) -> Callable[[Callable[..., None]], click.Command]:
    """A command on the lake: its function gets --lake, --config and --json beside what it asks for.

    Args:
        short_help: its line in the list of commands.
        example: a call, shown at the end of its help.
    """
    command = group.command(name, short_help=short_help, epilog=EXAMPLE + example)
    return lambda function: command(common_options(json_option(function)))
