"""Commands killed at random moments (SIGKILL): run again, they end in the rows of a run that was left alone.

But for timestamps, snapshot numbers and file names; the seed of the moments is printed when a test fails.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import dumps
import numpy as np
import pyarrow.parquet as pq
import pytest
from killed import Killer

from pipeline import schema
from pipeline.checks import run_checks
from pipeline.lake import Lake

pytestmark = pytest.mark.slow

MANY_GROUPS, FEW_GROUPS = 2200, 300  # many: more rollouts than an import commits at once
VOLATILE = {
    "created_at",
    "scored_at",
    "judged_at",
    "forgotten_at",
    "mining_id",
    "snapshot",
    "seconds",
    "path",
    "sha256",
}

NIGHT = """
max_prompts = 4
night = "2026-05-31"
[engine]
kind = "transformers"
batch_rollouts = 8
[sampling]
group_size = 4
max_tokens = 32
[train]
optim_steps = 1
prompts_per_step = 1
group_size = 4
clips_per_step = 2
"""


@pytest.fixture
def killer(tmp_path: Path) -> Killer:
    return Killer(seed=int(os.environ.get("KILL_SEED", time.time_ns() % 10**6)), log=tmp_path / "log")


def write_dump(path: Path, num_groups: int) -> Path:
    """Solved groups, one mixed and one failed, and a row that is refused."""
    night, random = dumps.night(), np.random.default_rng(0)
    rows = [row | {"reward": float("nan")} for row in night[:1]] + night[1:]
    for number in range(num_groups):
        for row in night[:2]:
            entropies = np.float32(random.gamma(0.5, 0.4, len(row["completion_ids"]))).tolist()
            rows.append(row | {"group_id": f"group {number}", "completion_entropies": entropies})
    return dumps.write_jsonl(path, rows)


def import_into(lake: Path, dump: Path) -> list[object]:
    return ["import", "rollouts", dump, "--tokenizer", dumps.MODEL, "--lake", lake]


def contents(lake: Path) -> dict[str, list[str]]:
    """Every table's rows but for what may differ, in a fixed order; the lake is sound."""
    found = {}
    with Lake.open(lake).reader() as reader:
        assert reader.verification(everything=True).damaged() == []
        assert [check.name for check in run_checks(reader) if check.num_offending] == []
        for table in schema.TABLES.keys() - {"files", "meta"}:
            columns = [name for name in schema.TABLES[table].names if name not in VOLATILE]
            names = ", ".join(f'"{name}"' for name in columns)
            rows = reader.rows(f"select {names} from lake.{table}")
            found[table] = sorted(json.dumps(row, default=str, sort_keys=True) for row in rows)
    return found


def survives(
    killer: Killer,
    num_kills: int,
    fresh: Callable[[], Path],
    arguments: Callable[[Path], list[object]],
    look: Callable[[Path], Any] = contents,
) -> None:
    """Kills the command on fresh lakes until `num_kills` were hit on the way, and runs each again."""
    calm = fresh()
    expected = killer.run(*arguments(calm)), look(calm)
    while killer.num_kills < num_kills:
        lake = fresh()
        killer.kill(*arguments(lake))
        assert (killer.run(*arguments(lake)), look(lake)) == expected
        shutil.rmtree(lake)


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Callable[[], Path]]:
    """Makes a maker of lakes: copies of one, or folders where there is none yet."""

    numbers = count()

    def maker(original: Path | None = None) -> Callable[[], Path]:
        def make() -> Path:
            lake = tmp_path / f"lake-{next(numbers)}"
            if original is not None:
                shutil.copytree(original, lake)
            return lake

        return make

    return maker


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    dump = write_dump(folder / "dump.jsonl", FEW_GROUPS)
    Killer(0, folder / "log").run(*import_into(folder / "lake", dump))
    return folder / "lake"


def test_an_import_that_was_killed_is_finished_by_the_next(killer, fresh, tmp_path):
    dump = write_dump(tmp_path / "dump.jsonl", MANY_GROUPS)
    survives(killer, 9, fresh(), lambda lake: import_into(lake, dump))


def test_a_mining_that_was_killed_is_finished_by_the_next(killer, fresh, imported):
    survives(killer, 8, fresh(imported), lambda lake: ["mine", "--lake", lake])


def exported(lake: Path) -> tuple[Any, dict[str, list[str]]]:
    """What a trainer that follows `latest.json` reads, and the lake."""
    latest = json.loads((lake / "out" / "latest.json").read_text())
    folder = lake / "out" / latest["export"]
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = [pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))]
    assert manifest["clips"] == sum(map(len, shards))
    return shards, contents(lake)


def test_an_export_that_was_killed_is_finished_by_the_next(killer, fresh, imported):
    killer.run("mine", "--lake", imported)

    def export(lake: Path) -> list[object]:
        return ["export", "shards", lake / "out", "--clips-per-shard", "100", "--lake", lake]

    survives(killer, 6, fresh(imported), export, exported)


def test_a_maintenance_that_was_killed_is_finished_by_the_next(killer, fresh, imported, tmp_path):
    for number in range(6):  # small commits, for a maintenance that merges them
        rows = [row | {"group_id": f"small {number}"} for row in dumps.night()[:2]]
        killer.run(*import_into(imported, dumps.write_jsonl(tmp_path / f"{number}.jsonl", rows)))
    data_file = next((imported / "files").rglob("rollouts/*.parquet"))
    for number in range(20):
        orphan = data_file.with_name(f"orphan-{number}.parquet")
        shutil.copy(data_file, orphan)
        os.utime(orphan, (0, 0))

    def maintained(lake: Path) -> dict[str, list[str]]:
        assert not list(lake.rglob("orphan-*"))
        with Lake.open(lake).reader() as reader:
            (_,) = [path for path in reader.data_files() if "/rollouts/" in path]  # merged
        return contents(lake)

    survives(killer, 5, fresh(imported), lambda lake: ["maintain", "--lake", lake], maintained)


def test_a_night_that_was_killed_is_finished_by_the_next(killer, fresh, tmp_path, prefect_url):
    killer.prefect_url = prefect_url
    (tmp_path / "night.toml").write_text(NIGHT)

    def night(lake: Path) -> list[object]:
        return ["nightly", "--config", tmp_path / "night.toml", "--lake", lake]

    survives(killer, 3, fresh(), night)


@pytest.fixture(scope="module")
def doubted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mined lake of more rollouts than verdicts are committed at once; half are false."""
    folder = tmp_path_factory.mktemp("doubted")
    rows = []
    for number in range(MANY_GROUPS // 2):
        rows += dumps.group(f"group {number}", [1.0, 1.0], seed=number)
        rows += dumps.group(f"untrue {number}", [1.0, 1.0], seed=number, prompt="3+4", ground_truth="7")
    calm = Killer(0, folder / "log")
    calm.run(*import_into(folder / "lake", dumps.write_jsonl(folder / "dump.jsonl", rows)))
    calm.run("mine", "--lake", folder / "lake")
    return folder / "lake"


def test_a_verification_that_was_killed_is_finished_by_the_next(killer, fresh, doubted):
    def judged(lake: Path) -> dict[str, list[str]]:
        found = contents(lake)
        assert len(found["verdicts"]) == 2 * MANY_GROUPS
        return found

    reverify = ["reverify", "--verifier", "exact", "--lake"]
    survives(killer, 4, fresh(doubted), lambda lake: [*reverify, lake], judged)


def test_a_forgetting_that_was_killed_is_finished_by_the_next(killer, fresh, doubted, tmp_path):
    prompts = dumps.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "3+4", "ground_truth": "7"}])

    def forgotten(lake: Path) -> dict[str, list[str]]:
        files = [str(pq.read_table(path).to_pylist()) for path in lake.rglob("*.parquet")]
        with closing(sqlite3.connect(lake / "catalog.sqlite")) as catalog:
            assert not [text for text in (*files, *catalog.iterdump()) if "untrue" in text]
        found = contents(lake)
        assert len(found["rollouts"]) == MANY_GROUPS
        return found

    forget = ["forget", "--prompt", prompts, "--yes", "--lake"]
    survives(killer, 5, fresh(doubted), lambda lake: [*forget, lake], forgotten)
