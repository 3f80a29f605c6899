"""Upkeep of a lake, on a schedule: merge small files, expire old snapshots, delete what nothing names.

Annotations here are no strings: Prefect reads them to validate the parameters of a scheduled run.
"""

from pathlib import Path

from prefect import flow, task

from pipeline import maintenance
from pipeline.config import MaintainConfig
from pipeline.lake import Lake


@task(name="merge small files", persist_result=False)
def merge_small_files(lake: Path, config: MaintainConfig) -> int:
    return maintenance.merge_small_files(Lake.open(lake), config)


@task(name="record merged files", persist_result=False)
def record_merged_files(lake: Path) -> int:
    return maintenance.record_merged_files(Lake.open(lake))


@task(name="expire snapshots", persist_result=False)
def expire_snapshots(lake: Path, config: MaintainConfig) -> int:
    return maintenance.expire_snapshots(Lake.open(lake), config)


@task(name="delete unnamed files", persist_result=False)
def delete_unnamed_files(lake: Path, config: MaintainConfig) -> tuple[int, int]:
    return maintenance.delete_unnamed_files(Lake.open(lake), config)


@flow(name="maintain", persist_result=False)
def maintain(config: MaintainConfig, lake: Path) -> maintenance.Maintained:
    """Merge small files, expire old snapshots, delete what nothing names."""
    merged = merge_small_files(lake, config)
    hashed = record_merged_files(lake)
    expired = expire_snapshots(lake, config)
    deleted, orphans = delete_unnamed_files(lake, config)
    return maintenance.Maintained(merged, hashed, expired, deleted, orphans)
