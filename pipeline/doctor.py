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


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    text: str


def examine(config: NightlyConfig, lake: Path) -> list[Finding]:
    """Every finding, good and bad. Reads all data files of the lake once."""
    return [*_packages(), *_devices(), _model(config), *examine_lake(lake)]


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


def examine_lake(folder: Path) -> Iterator[Finding]:
    """What there is to say of a lake: checksums, counts, references, exported files, disk."""
    try:
        if not Lake(folder.absolute()).catalog.exists():
            yield Finding("lake", True, f"none in {folder} yet; `echomine nightly` makes it")
            return
        lake = Lake.open(folder)
        with lake.reader() as reader:
            damaged = reader.verification(everything=True).damaged()
            for file in damaged:
                yield Finding(f"file {file.path}", False, f"{file.problem}. Restore it from a backup.")
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
