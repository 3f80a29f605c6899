"""Tables for people: the example questions of `sql`, and what `mine --what-if` found."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from flows.commands.output import counted
from pipeline.sqlfiles import examples
from pipeline.what_if import Simulation


def print_examples() -> None:
    """The names of the example questions, and what each asks."""
    table = Table("name", "question", show_edge=False)
    for name, question in examples().items():
        table.add_row(name, question)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _setting(value: Any) -> Any:
    if isinstance(value, str) and value.isspace():
        return repr(value)
    return "none" if value is None else value


def print_simulation(simulation: Simulation) -> None:
    """The last mining beside what it would have found, and how many clips both found."""
    changes = {name: _setting(value) for name, value in simulation.changes.items()}
    last, what_if, overlap = simulation.last, simulation.what_if, simulation.overlap
    table = Table("")
    for name in ("last mining", "what if", "change"):
        table.add_column(name, justify="right")
    for name in ("clips", "groups_with_clips", "clip_tokens"):
        before, after = getattr(last, name), getattr(what_if, name)
        table.add_row(name.replace("_", " "), f"{before:,}", f"{after:,}", f"{after - before:+,}")
    table.add_row("mean step entropy", _nats(last.mean_step_entropy), _nats(what_if.mean_step_entropy), "")
    table.add_row("clips of both", f"{overlap.both:,}", f"{overlap.both:,}", "")
    table.add_row("clips of it alone", f"{overlap.only_last:,}", f"{overlap.only_what_if:,}", "")
    click.echo(
        f"Mining {simulation.mining_id[:12]} of snapshot {simulation.snapshot}, "
        f"what if {', '.join(f'{name}={value}' for name, value in changes.items())}"
    )
    Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(table)
    click.echo(f"groups   {counted(what_if.groups)}; in the last mining: {counted(last.groups)}")
    click.echo(f"dropped  {counted(what_if.dropped)}; in the last mining: {counted(last.dropped)}")
    click.echo("Nothing was written.")


def _nats(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f} nats"
