"""The command `echomine`. Exit codes: 0 done, 2 a user's mistake, 3 nothing to mine, 1 a fault of ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from flows.commands import ask, care, clips, exports, look, night, rollouts, trust
from flows.commands.group import echomine
from pipeline.errors import EchoMineError

# In the order of a night, which is the order that `--help` lists them in.
_IN_ORDER = (
    night.nightly,
    night.generate,
    rollouts.score,
    rollouts.import_,
    clips.mine,
    exports.export,
    clips.train,
    ask.sql,
    look.report,
    look.audit,
    trust.reverify,
    trust.forget,
    care.init,
    care.maintain,
    care.doctor,
)
echomine.commands = {command.name: command for command in _IN_ORDER if command.name}

INTERRUPTED = 130
CLOSED_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; a user's mistake is one line on standard error."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        echomine.main(args=given, prog_name="echomine", standalone_mode=False, obj=tuple(given))
        sys.stdout.flush()
    except EchoMineError as error:
        click.echo(f"echomine: {error}", err=True)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        click.echo(f"echomine: {_usage(error)}", err=True)
        return 2
    except BrokenPipeError:  # `echomine sql … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (click.Abort, KeyboardInterrupt):
        click.echo("echomine: stopped. Start it again to go on; what was committed stays.", err=True)
        return INTERRUPTED
    return 0


def _usage(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    text = " ".join(error.format_message().split()).rstrip(".")
    return f"{text}. See `{context.command_path if context else 'echomine'} --help`."


if __name__ == "__main__":
    sys.exit(main())
