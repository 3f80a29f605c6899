"""What `echomine audit` prints: two tables for people, or one JSON object."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.commands.output import counted
from pipeline.audits.core import Audit
from pipeline.report_text import number, percent, phantom


def audit_json(audit: Audit) -> dict[str, Any]:
    """Every figure; what is not known is null."""
    return {
        "classes": {name: asdict(figures) for name, figures in audit.classes.items()},
        "groups": audit.groups,
        "zero_advantage_groups": audit.zero_advantage_groups,
        "tokens": audit.tokens,
        "zero_advantage_tokens": audit.zero_advantage_tokens,
        "zero_advantage_share": audit.zero_advantage_share,
        "rules": [asdict(rule) for rule in audit.rules],
        "clips": audit.mined.clips,
        "dropped": audit.mined.dropped,
        "not_mined": audit.mined.why_not or None,
        "refused": dict(audit.refused),
        "refused_by_mining": audit.mined.refused,
    }


def print_audit(audit: Audit) -> None:
    """The classes, what their zero-advantage groups cost, and what trainers' rules make of them."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    console.print(_classes(audit))
    click.echo(_cost(audit))
    click.echo("")
    console.print(_rules(audit))
    if audit.mined.clips is None:
        click.echo(f"EchoClips: not mined; {audit.mined.why_not}")
    else:
        dropped = counted(audit.mined.dropped)
        click.echo(f"Mining them would yield {audit.mined.clips:,} EchoClips; dropped: {dropped}.")
    if audit.refused:
        click.echo(f"Rows left out: {counted(audit.refused)}.")
    if audit.mined.refused and audit.mined.refused != audit.refused:
        click.echo(f"Rows that could not be mined: {counted(audit.mined.refused)}.")


def _classes(audit: Audit) -> Table:
    table = Table("class", title="Groups by class", title_justify="left")
    for name in ("groups", "rollouts", "completion tokens", "of all tokens"):
        table.add_column(name, justify="right")
    for name, figures in audit.classes.items():
        share = "–" if figures.tokens is None else percent(figures.tokens, audit.tokens or 0)
        table.add_row(name, f"{figures.groups:,}", f"{figures.rollouts:,}", number(figures.tokens), share)
    return table


def _cost(audit: Audit) -> str:
    if audit.tokens is None or audit.zero_advantage_share is None:
        share = percent(audit.zero_advantage_groups, audit.groups)
        return (
            f"Zero-advantage groups: {audit.zero_advantage_groups:,} of {audit.groups:,} groups ({share}) "
            "taught nothing."
        )
    return (
        f"Zero-advantage groups: {audit.zero_advantage_tokens:,} of {audit.tokens:,} completion tokens "
        f"({audit.zero_advantage_share:.1%}) taught nothing."
    )


def _rules(audit: Audit) -> Table:
    mixed = audit.classes["mixed"].groups if "mixed" in audit.classes else 0
    table = Table(
        "trainer",
        "signal if",
        title="What trainers' rules make of them",
        title_justify="left",
        caption="missed: zero-advantage groups taken for signal; phantom: the largest and the mean "
        "|advantage| they get; unfiltered: the largest where the rule is off; dropped: mixed groups taken "
        "for zero advantage",
        caption_justify="left",
    )
    counts = (f"missed, of {audit.zero_advantage_groups:,}", "their tokens")
    for name in (*counts, "phantom", "mean", "unfiltered", f"dropped, of {mixed:,}"):
        table.add_column(name, justify="right")
    for rule in audit.rules:
        table.add_row(
            rule.trainer,
            Text(rule.test),  # its brackets are no markup
            f"{rule.missed:,}",
            number(rule.missed_tokens),
            phantom(rule.largest_phantom),
            phantom(rule.mean_phantom),
            phantom(rule.largest_unfiltered),
            f"{rule.dropped:,}",
        )
    return table
