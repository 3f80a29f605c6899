"""The audit as an HTML page that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.audits.core import Audit
from pipeline.pages import page_template, write_page
from pipeline.report_charts import CLASS_COLOURS
from pipeline.report_text import number, percent

CLASS_MEANINGS = {
    "all_success": "every rollout succeeded: advantage 0, and the EchoClips",
    "mixed": "rewards differ: the only groups that move the policy gradient",
    "all_fail": "every rollout failed: advantage 0",
    "all_equal": "equal rewards between failure and success: advantage 0",
    "incomplete": "rollouts are missing; left out of the rules",
}


def write_audit_page(audit: Audit, files: Sequence[Path], path: Path) -> Path:
    """Writes the page, complete or not at all. Returns `path`.

    Raises:
        LakeError: it cannot be written.
    """
    classes = [(name, audit.classes[name]) for name in CLASS_COLOURS if name in audit.classes]
    page = page_template("audit.html").render(
        audit=audit,
        files=[file.name for file in files],
        figures=_figures(audit),
        classes=classes,
        colours=CLASS_COLOURS,
        meanings=CLASS_MEANINGS,
        mixed=audit.classes["mixed"].groups if "mixed" in audit.classes else 0,
    )
    return write_page(page, path)


def _figures(audit: Audit) -> list[tuple[str, str, str]]:
    """(figure, name, meaning) of the row of key figures."""
    tokens = audit.tokens
    return [
        (number(audit.groups), "groups", f"{number(audit.zero_advantage_groups)} with zero advantage"),
        (
            percent(audit.zero_advantage_groups, audit.groups),
            "groups that taught nothing",
            "all their rewards are equal",
        ),
        (
            "–" if tokens is None else percent(audit.zero_advantage_tokens or 0, tokens),
            "tokens that taught nothing",
            "not every rollout tells its length" if tokens is None else f"of {number(tokens)} in completions",
        ),
        (
            number(audit.mined.clips),
            "EchoClips",
            "not mined" if audit.mined.clips is None else "a mining would yield",
        ),
    ]
