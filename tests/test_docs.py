"""What the documentation shows, works."""

import re
import shlex
from pathlib import Path

import click
import pytest

from flows.cli import echomine
from pipeline.config import NightlyConfig

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def blocks(language):
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


def commands():
    lines = [line for block in blocks("bash") for line in block.values[0].splitlines()]
    return sorted({line for line in lines if line.startswith("echomine ")})


@pytest.mark.parametrize("query", blocks("sql"))
def test_queries_of_the_documentation_have_answers(query, sample_lake):
    with sample_lake.lake.reader() as reader:
        assert reader.select(query).table.num_rows > 0


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_documentation_have_the_options_they_show(line):
    words = shlex.split(line, comments=True)[1:]
    command, context = echomine, click.Context(echomine)
    while isinstance(command, click.Group):
        name = words.pop(0)
        command = command.commands[name]
    command.make_parser(context).parse_args(words)


def test_the_files_that_the_documentation_names_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_config_that_the_documentation_shows_is_valid():
    import tomllib

    for page in PAGES:
        for text in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
            NightlyConfig.model_validate(tomllib.loads(text))
