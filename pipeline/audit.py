"""The audit: what share of a training's rollouts taught nothing, read from its dumps alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.config import MiningConfig
from pipeline.formats.canonical import check_files, import_canonical
from pipeline.lake import Lake
from pipeline.mine import WHOLE_LAKE, mine
from pipeline.sqlfiles import sql_file

ZERO_ADVANTAGE = ("all_success", "all_fail", "all_equal")


@dataclass(frozen=True)
class ClassFigures:
    """One class of groups: how many, with how many rollouts and completion tokens."""

    groups: int
    rollouts: int
    tokens: int


@dataclass(frozen=True)
class Audit:
    """What dumps hold.

    Attributes:
        classes: figures by class of group; classes that do not occur are left out.
        clips: EchoClips that a mining would yield.
        dropped: clips (for `unscored`: groups) that it would drop, by reason.
        refused: rows that could not be read as rollouts, by reason; they are in no other figure.
    """

    classes: Mapping[str, ClassFigures]
    clips: int
    dropped: Mapping[str, int]
    refused: Mapping[str, int]

    @property
    def tokens(self) -> int:
        """Completion tokens of all groups."""
        return sum(figures.tokens for figures in self.classes.values())

    @property
    def zero_advantage_tokens(self) -> int:
        """Completion tokens of groups whose rollouts all earned the same reward."""
        return sum(self.classes[name].tokens for name in ZERO_ADVANTAGE if name in self.classes)

    @property
    def zero_advantage_share(self) -> float:
        """Of all completion tokens, from 0 to 1; 0 if there are none."""
        return self.zero_advantage_tokens / self.tokens if self.tokens else 0.0


def audit(
    files: Sequence[Path],
    tokenizer: Any,
    config: MiningConfig,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Imports canonical dumps into a lake of their own, mines it, and counts; the lake is gone afterwards.

    Args:
        progress: called with the number of rows read so far.

    Raises:
        FormatError: a file is missing, cut off, of another kind, or lacks a required column.
        MiningError: the dumps hold several kinds of entropy, and the config selects none.
    """
    check_files(files)
    with TemporaryDirectory(prefix="echomine-audit-") as folder:
        lake = Lake.create(Path(folder) / "lake")
        import_canonical(lake, files, tokenizer, progress)
        mined = mine(lake, config)
        with lake.reader() as reader:
            params = config.model_dump() | WHOLE_LAKE
            reader.materialize_rows("touched_groups", reader.touched_groups(reader.snapshot))
            reader.materialize("group_classes", sql_file("mining/group_classes"), params)
            figures = reader.rows(sql_file("reports/class_figures"))
            refused = reader.rows("select reason, count(*) as n from quarantine group by all order by reason")
    return Audit(
        {
            row["group_class"]: ClassFigures(row["num_groups"], row["num_rollouts"], row["num_tokens"])
            for row in figures
        },
        mined.clips,
        mined.dropped,
        {row["reason"]: row["n"] for row in refused},
    )
