"""`echomine sql`: a query, an example, a prompt, or the lines that open the lake elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from flows.commands.group import EXAMPLE, echomine
from flows.options import common_options, snapshot_option
from pipeline.config import load_config
from pipeline.errors import QueryError


class _Query(click.Command):
    """Takes a text that begins with a comment of SQL for a query, not for an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(
            ctx, [f"\n{arg}" if arg.startswith(("-- ", "--\n")) else arg for arg in args]
        )


@echomine.command(
    cls=_Query,
    short_help="Ask the lake anything; reading only.",
    epilog=EXAMPLE + 'echomine sql "select group_class, count(*) from groups group by all"',
)
@click.argument("query", required=False)
@common_options
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
)
@snapshot_option
@click.option("--example", metavar="NAME", help="run an example question")
@click.option("--examples", is_flag=True, help="list the example questions")
@click.option("--attach", is_flag=True, help="print the lines that open this lake elsewhere")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="seconds after which a query is stopped"
)
@click.option("--memory-limit", metavar="SIZE", help="memory that a query may take, such as 2GB")
def sql(
    query: str | None,
    lake: Path,
    config: Path | None,
    form: str,
    snapshot: int | None,
    example: str | None,
    examples: bool,
    attach: bool,
    timeout: float | None,
    memory_limit: str | None,
) -> None:
    """Ask the lake anything; reading only.

    Without QUERY it is read from standard input; on a terminal a prompt opens, which completes the names of
    relations, columns and macros. `from snapshots` lists what --snapshot can go back to.
    """
    if (query is not None) + (example is not None) + examples + attach > 1:
        raise click.UsageError("Give one of QUERY, --example, --examples and --attach")
    load_config(config)
    from pipeline.query import Limits

    limits = Limits(timeout, memory_limit)
    if examples:
        from flows.tables import print_examples

        print_examples()
    elif attach:
        _print_attach_lines(lake, snapshot)
    elif query is None and example is None and sys.stdin.isatty() and sys.stdout.isatty():
        from flows.sql_prompt import ask_until_done
        from pipeline.lake import Lake

        with Lake.open(lake).reader(snapshot) as reader:
            ask_until_done(reader, limits, form)
    else:
        from flows.answers import write_answer
        from pipeline.lake import Lake

        text = _text(query, example)
        with Lake.open(lake).reader(snapshot) as reader:
            answer = reader.select(text, limits)
        write_answer(answer, form)


def _text(query: str | None, example: str | None) -> str:
    from pipeline import sqlfiles

    if example is not None:
        return sqlfiles.example(example)
    text = sys.stdin.read() if query is None and not sys.stdin.isatty() else query
    if text is None or not text.strip():
        raise QueryError(
            "There is no query. Give one as an argument or on standard input; see `echomine sql --examples`."
        )
    return text


def _print_attach_lines(lake: Path, snapshot: int | None) -> None:
    from pipeline.attach import attach_lines
    from pipeline.lake import Lake

    opened = Lake.open(lake)
    with opened.reader(snapshot):  # says if there is no such snapshot
        for program, lines in attach_lines(opened, snapshot).items():
            click.echo(f"# {program}")
            click.echo("\n".join(lines) + "\n")
