"""What `echomine doctor` looks at: versions, devices, the engine, and every data file of the lake."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pipeline.checks import run_checks
from pipeline.config import NightlyConfig
from pipeline.engines.vllm_start import installed_version as installed_vllm
from pipeline.errors import EchoMineError
from pipeline.hashing import file_sha256
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.models import model_folder
from pipeline.set_aside import set_aside as set_aside_files
from pipeline.tokenization import load_tokenizer

# Versions that were resolved and run together; others may work and are named.
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "vllm": "0.32.0",
    "duckdb": "1.5.5",
    "duckdb-extension-ducklake": "1.5.5",
    "duckdb-extension-sqlite": "1.5.5",
    "duckdb-extension-postgres": "1.5.5",
    "polars": "2.1.0",
    "pyarrow": "26.0.1",
    "prefect": "3.7.7",
    "fastapi": "0.136.3",
    "reasoning-gym": "0.1.25",
    "math-verify": "0.9.0",
}
LOW_DISK_BYTES = 2**30
DAMAGE_CURE = (
    "Restore it from a backup: copy it back to this path. Without one, `echomine doctor --set-aside` "
    "takes it out, so that everything else works on."
)
# How the rows of a table come back whose data file was set aside.
RETURNS = {
    "rollouts": "Import the dumps they came from again, or a backup's copy of this file (`echomine import "
    "rollouts COPY --format canonical --tokenizer DIR`); only what is lost is added. Then mine.",
    "prompts": "Import the dumps they came from again.",
    "verdicts": "Run `echomine reverify`: until then clips that they withdrew count again.",
    "echo_clips": "Mine again as it was mined (`echomine mine`): the same clips come back.",
    "scorings": "Run `echomine score --rescore` to know again whose entropies these are.",
    "quarantine": "Import the dumps again to have their refused rows named again.",
}


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    text: str


def examine(config: NightlyConfig, lake: Path, set_aside: bool = False) -> list[Finding]:
    """Every finding, good and bad. Reads all data files of the lake once.

    Args:
        set_aside: takes damaged data files out of the lake first.
    """
    return [*_packages(), *_devices(), _model(config), *examine_lake(lake, set_aside)]


def _packages() -> Iterator[Finding]:
    yield Finding("python", sys.version_info >= (3, 11), sys.version.split()[0])
    for name, tested in TESTED.items():
        try:
            found = installed_vllm() if name == "vllm" else version(name)
        except PackageNotFoundError:
            found = None
        if found is None:
            yield Finding(name, False, f"is not installed; tested with {tested}. Run `make setup`.")
            continue
        note = "" if found.split("+")[0] == tested else f", tested with {tested}"
        yield Finding(name, True, found + note)


def _devices() -> Iterator[Finding]:
    yield Finding("cpu", True, f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield Finding(f"cuda:{index}", True, f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    else:
        yield Finding("cuda", True, "none; engines and training run on the CPU")


def _model(config: NightlyConfig) -> Finding:
    try:
        folder = model_folder(config.model)
        tokens = len(load_tokenizer(folder))
    except EchoMineError as error:
        return Finding("model", False, str(error))
    return Finding(
        "model", True, f"{config.model} in {folder}, {tokens:,} tokens, engine {config.engine.kind}"
    )


def examine_lake(folder: Path, set_aside: bool = False) -> Iterator[Finding]:
    """What there is to say of a lake: checksums, counts, references, exported files, disk. As `examine`."""
    try:
        if not Lake(folder.absolute()).catalog.exists():
            yield Finding("lake", True, f"none in {folder} yet; `echomine nightly` makes it")
            return
        lake = Lake.open(folder)
        if set_aside:
            yield from _set_aside(lake)
        with lake.reader() as reader:
            damaged = reader.verification(everything=True).damaged()
            for file in damaged:
                yield Finding(f"file {file.path}", False, f"{file.problem}. {DAMAGE_CURE}")
            if damaged:  # what else there is to ask would be answered from them
                return
            yield Finding("data files", True, "all are as they were written (SHA-256)")
            yield from _contents(folder, reader)
            yield from _exports(reader)
    except EchoMineError as error:
        yield Finding("lake", False, str(error))
        return
    free = shutil.disk_usage(folder).free
    low = free < LOW_DISK_BYTES
    yield Finding(
        "disk", not low, f"{free / 2**30:.1f} GiB free" + (". Free some before tonight." if low else "")
    )


def _set_aside(lake: Lake) -> Iterator[Finding]:
    files = set_aside_files(lake)
    for file in files:
        runs = sorted({run for run in (file.first_run, file.last_run) if run is not None})
        of_runs = f" of {' to '.join(runs)}" if runs else ""
        place = f"It is now {lake.folder / file.kept}." if file.kept else "Nothing of it is left."
        back = RETURNS.get(file.table, "Only a backup of the whole lake has these rows.")
        text = f"{file.problem}; it held {file.num_rows:,} rows{of_runs}. {place} {back}"
        yield Finding(f"set aside {file.path}", True, text)
    if any(file.table == "rollouts" for file in files):
        with lake.reader() as reader:
            lost = reader.rows(
                "select count(*) as clips, count(distinct group_id) as groups "
                "from echo_clips anti join rollouts using (rollout_id)"
            )[0]
        text = (
            f"at least {lost['groups']:,} groups lost rollouts that {lost['clips']:,} recorded clips are of"
        )
        yield Finding("lost clips", True, text)


def _contents(folder: Path, reader: Reader) -> Iterator[Finding]:
    counts = reader.rows("select count(*) as rollouts, count(distinct group_id) as groups from rollouts")[0]
    text = (
        f"{folder}: {counts['rollouts']:,} rollouts, {counts['groups']:,} groups, snapshot {reader.snapshot}"
    )
    yield Finding("lake", True, text)
    for check in run_checks(reader):
        query = f'echomine sql "$(cat sql/checks/{check.name}.sql)"'
        found = (
            f"{check.num_offending} offending rows; `{query}` lists them. {check.cure}"
            if check.num_offending
            else "none"
        )
        yield Finding(f"check {check.name}", not check.num_offending, found)


def _exports(reader: Reader) -> Iterator[Finding]:
    """Exported files against their recorded SHA-256. Whoever deletes a whole export may do so."""
    changed, gone, sound = [], 0, 0
    for row in reader.rows("select path, list(sha256) as hashes from shards group by path order by path"):
        path = Path(row["path"])
        if not path.parent.is_dir():
            gone += 1
        elif not path.is_file() or file_sha256(path) not in row["hashes"]:
            changed.append(path)
        else:
            sound += 1
    for path in changed:
        yield Finding(
            f"shard {path.parent.name}/{path.name}",
            False,
            f"{path} is missing or not as it was exported. Delete {path.parent} and export again "
            "(`echomine export shards`).",
        )
    if not changed:
        yield Finding("shards", True, f"{sound} files are as they were exported, {gone} are no longer there")
