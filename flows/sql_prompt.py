"""The prompt of `echomine sql`: prompt_toolkit's, on the restricted session of a lake."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer

from flows.answers import write_answer
from flows.commands.output import note
from flows.tables import print_examples
from pipeline.errors import EchoMineError, nearest
from pipeline.lake_reader import Reader
from pipeline.query import Limits
from pipeline.sqlfiles import example, sql_file

MAX_ROWS = 200  # of one answer; whoever wants more writes them to a file
COMMANDS = (".help", ".examples", ".example", ".quit")


def ask_until_done(reader: Reader, limits: Limits, form: str) -> None:
    """Reads queries, each up to its `;`, and answers them, until Ctrl-D or `.quit`."""
    session = _session(reader)
    click.echo(
        f"Snapshot {reader.snapshot} of {reader.lake.folder}, reading only. "
        "End a query with `;`. Tab completes, Ctrl-C stops a query, `.help` helps, Ctrl-D leaves."
    )
    while True:
        try:
            text = session.prompt().strip()
        except KeyboardInterrupt:  # the line is given up, not the prompt
            continue
        except EOFError:
            return
        if text.rstrip(";").strip() in (".quit", "quit", "exit"):
            return
        if text:
            _answered(reader, replace(limits, max_rows=MAX_ROWS), form, text)


def _answered(reader: Reader, limits: Limits, form: str, text: str) -> None:
    try:
        query = _command(text) if text.startswith(".") else text
        if query is not None:
            answer = reader.select(query, limits)
            write_answer(answer, form)
            if answer.cut_off:
                note(f'More than {MAX_ROWS} rows: `echomine sql "…" --format csv > FILE` writes them all.')
    except EchoMineError as error:
        note(f"echomine: {error}")
    except click.UsageError as error:
        note(f"echomine: {error.message}")
    except KeyboardInterrupt:
        note("The query was stopped.")


def _command(text: str) -> str | None:
    """Does what a line that starts with a dot says, or returns the query it stands for."""
    name, *arguments = text.rstrip(";").split()
    if name == ".examples":
        print_examples()
    elif name == ".example" and len(arguments) == 1:
        return example(arguments[0])
    elif name == ".help":
        click.echo(
            "`show tables;` lists the relations, `describe groups;` a relation's columns.\n"
            ".examples lists example questions, .example NAME runs one, .quit leaves."
        )
    elif name == ".example":
        note("echomine: Give one name, as in `.example wasted_tokens`; `.examples` lists them.")
    else:
        note(f"echomine: There is no command `{name}`: {nearest(name, COMMANDS)}")
    return None


def _session(reader: Reader) -> PromptSession[str]:
    words = {row["word"]: row["kind"] for row in reader.rows(sql_file("prompt/words"))}
    return PromptSession(
        "lake> ",
        prompt_continuation=lambda width, _number, _wrapped: "…".rjust(width - 1) + " ",
        multiline=Condition(_is_unfinished),
        completer=WordCompleter(sorted(words), ignore_case=True, meta_dict=words),
        complete_while_typing=False,
        lexer=PygmentsLexer(SqlLexer),
        history=_history(),
    )


def _is_unfinished() -> bool:
    """Whether Enter starts another line: a query goes on until its `;`."""
    text = get_app().current_buffer.text.strip()
    return bool(text) and not text.endswith(";") and not text.startswith(".") and text not in ("quit", "exit")


def _history() -> History:
    """What was asked before, in a file of the user's that no one else reads."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "echomine" / "sql_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
    except OSError as error:
        note(f"Queries are not remembered: {path} cannot be written ({error.strerror}).")
        return InMemoryHistory()
    return FileHistory(path)
