"""The upkeep of a lake as a scheduled flow does it."""

from __future__ import annotations

import shutil

from prefect.testing.utilities import prefect_test_harness

from flows.maintain import maintain
from pipeline.config import MaintainConfig
from pipeline.lake import Lake
from pipeline.maintenance import Maintained


def test_the_flow_does_what_the_command_does(lake, tmp_path):
    folder = tmp_path / "lake"
    shutil.copytree(lake, folder)
    minings = "select mining_id from mining_runs order by all"
    with Lake.open(folder).reader() as reader:
        before = reader.rows(minings)
    with prefect_test_harness(server_startup_timeout=600):
        first = maintain(MaintainConfig(grace_hours=0), folder)
        assert first.expired_snapshots > 0
        assert maintain(MaintainConfig(grace_hours=0), folder) == Maintained(0, 0, 0, 0, 0)
    with Lake.open(folder).reader() as reader:
        assert reader.rows(minings) == before != []


def test_a_served_upkeep_cannot_be_a_dry_run(refused):
    assert "--serve does what --dry-run would only say" in refused("maintain", "--serve", "--dry-run")
