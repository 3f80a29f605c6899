"""The audit: what a training's rollouts taught, and what its trainer made of them, read from its dumps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.audits.rows import dump_rows, source_rows
from pipeline.audits.rules import RuleFigures, rule_figures
from pipeline.config import MiningConfig
from pipeline.errors import EchoMineError
from pipeline.formats.source_rows import Format
from pipeline.imports.core import check_dumps, import_rollouts, with_formats
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.mine import NO_GROUPS, WHOLE_LAKE, mine
from pipeline.sqlfiles import sql_file

ZERO_ADVANTAGE = ("all_success", "all_fail", "all_equal")
_BATCH_GROUPS = 4096


@dataclass(frozen=True)
class ClassFigures:
    """One class of groups: how many, with how many rollouts and completion tokens (None: not known)."""

    groups: int
    rollouts: int
    tokens: int | None


@dataclass(frozen=True)
class Yield:
    """What mining the dumps would give.

    Attributes:
        clips: EchoClips; None if they could not be mined.
        dropped: clips (for `unscored`: groups) that the mining would drop, by reason.
        refused: rows that could not be read as rollouts, by reason.
        why_not: why they could not be mined, if they could not.
    """

    clips: int | None
    dropped: Mapping[str, int]
    refused: Mapping[str, int]
    why_not: str = ""


@dataclass(frozen=True)
class Audit:
    """What dumps hold.

    Attributes:
        classes: figures by class of group; classes that do not occur are left out.
        rules: what the rule of each trainer makes of the groups.
        refused: rows without a group or a reward, by reason; they are in no figure of classes and rules.
    """

    classes: Mapping[str, ClassFigures]
    rules: tuple[RuleFigures, ...]
    refused: Mapping[str, int]
    mined: Yield

    @property
    def groups(self) -> int:
        return sum(figures.groups for figures in self.classes.values())

    @property
    def zero_advantage_groups(self) -> int:
        return sum(self.classes[name].groups for name in ZERO_ADVANTAGE if name in self.classes)

    @property
    def tokens(self) -> int | None:
        """Completion tokens of all groups; None where a dump does not tell, or there is no group."""
        if not self.classes:
            return None
        return _sum(figures.tokens for figures in self.classes.values())

    @property
    def zero_advantage_tokens(self) -> int | None:
        """Completion tokens of groups whose rollouts all earned the same reward."""
        if self.tokens is None:
            return None
        return _sum(self.classes[name].tokens for name in ZERO_ADVANTAGE if name in self.classes)

    @property
    def zero_advantage_share(self) -> float | None:
        """Of all completion tokens, from 0 to 1; 0 if there are none."""
        if self.tokens is None or self.zero_advantage_tokens is None:
            return None
        return self.zero_advantage_tokens / self.tokens if self.tokens else 0.0


def audit(
    files: Sequence[Path],
    tokenizer: Any | None,
    config: MiningConfig,
    progress: Callable[[int], None] | None = None,
    format_name: str | None = None,
) -> Audit:
    """Classes the groups of dumps by their rewards, judges trainers' rules, and mines what can be mined.

    It all happens in a lake of its own, which is gone afterwards.

    Args:
        tokenizer: of the model that sampled; without it nothing is mined, and text has no tokens.
        progress: called with the number of rows read so far.
        format_name: what wrote the files; by default what their content says.

    Raises:
        FormatError: a file is missing, cut off, or of another kind.
    """
    dumps = with_formats(files, format_name)
    refused: Counter[str] = Counter()
    with TemporaryDirectory(prefix="echomine-audit-") as folder:
        lake = Lake.create(Path(folder) / "lake")
        rows = dump_rows(source_rows(dumps), tokenizer, refused, progress)
        with lake.reader() as reader:
            reader.materialize_rows("dump_rows", rows)
            del rows
            _classify(reader, config)
            groups: Counter[str] = Counter()
            rollouts: Counter[str] = Counter()
            tokens: dict[str, int | None] = {}

            def counted() -> Iterator[Mapping[str, Any]]:
                for batch in reader.batches(sql_file("reports/dump_groups"), _BATCH_GROUPS):
                    for group in batch.to_pylist():
                        name = group["group_class"]
                        groups[name] += 1
                        rollouts[name] += group["num_rollouts"]
                        tokens[name] = _sum((tokens.get(name, 0), group["num_tokens"]))
                        yield group

            rules = rule_figures(counted())
        mined = _mined(lake, dumps, tokenizer, config)
    classes = {name: ClassFigures(groups[name], rollouts[name], tokens[name]) for name in sorted(groups)}
    return Audit(classes, rules, dict(sorted(refused.items())), mined)


def _classify(reader: Reader, config: MiningConfig) -> None:
    reader.materialize("dump_rollouts", sql_file("staging/dump_rollouts"), {})
    # In this session the dump's rollouts stand where the lake's would: the rule of classes reads them.
    reader.materialize("rollouts", "select null::varchar as rollout_id, * from dump_rollouts", {})
    reader.materialize_rows("touched_groups", NO_GROUPS)
    params = config.model_dump() | WHOLE_LAKE
    reader.materialize("group_classes", sql_file("mining/group_classes"), params)


def _mined(
    lake: Lake, dumps: Sequence[tuple[Path, Format]], tokenizer: Any | None, config: MiningConfig
) -> Yield:
    if tokenizer is None:
        return Yield(None, {}, {}, "steps need token texts: give the model's folder with --tokenizer")
    try:
        check_dumps(dumps)
        import_rollouts(lake, dumps, tokenizer)
        found = mine(lake, config, tokenizer=lambda: tokenizer)
    except EchoMineError as error:
        return Yield(None, {}, {}, str(error))
    with lake.reader() as reader:
        refused = reader.rows("select reason, count(*) as n from quarantine group by all order by reason")
    return Yield(found.clips, found.dropped, {row["reason"]: row["n"] for row in refused})


def _sum(values: Iterable[int | None]) -> int | None:
    """None if one is not known: a sum of the others would be less than it says."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total
