"""A lake in which a prompt left its traces everywhere, made once and copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forget_helpers import SECRET, WRITTEN, lake_rows
from sample_lake import LakeBuilder, overturned

from pipeline.config import MiningConfig
from pipeline.mine import mine
from pipeline.quarantine import Refused
from pipeline.rollouts import rollout_table


@pytest.fixture
def builder(traced: LakeBuilder, tmp_path: Path) -> LakeBuilder:
    """A mined lake with two groups, one of them of the secret prompt, which left traces everywhere."""
    return traced.copied(tmp_path / "lake")


@pytest.fixture
def mined(mined_once: LakeBuilder, tmp_path: Path) -> LakeBuilder:
    """The same groups and a mining of them; nothing was refused, replaced or overturned."""
    return mined_once.copied(tmp_path / "lake")


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> LakeBuilder:
    builder, name = _two_groups(tmp_path_factory.mktemp("traced"))
    lost = {**builder.rows[-1], "sample_index": 5, "reward": None}
    raw = {"line": json.dumps({"prompt": SECRET, "completion": WRITTEN})[:-3]}
    other = Refused("no reward", "dump:2", {"group_id": "another", "prompt": "What is 17+25?"})
    lake = builder.commit([Refused("no reward", name, lost), Refused("no JSON", "dump:1", raw), other])
    lake.replace_rollouts(  # the bytes of the row before stay in its file
        rollout_table([builder.rows[-2]]), lake_rows(lake, "scorings")
    )
    mine(lake, MiningConfig())
    overturned(lake, 2)
    return builder


@pytest.fixture(scope="session")
def mined_once(tmp_path_factory: pytest.TempPathFactory) -> LakeBuilder:
    builder, _ = _two_groups(tmp_path_factory.mktemp("mined"))
    mine(builder.commit(), MiningConfig())
    return builder


def _two_groups(folder: Path) -> tuple[LakeBuilder, str]:
    """Not yet committed, and the id of the secret prompt's group."""
    builder = LakeBuilder(folder / "lake")
    builder.add_group(["1\n#42", "20\n30\n#42"], [1.0, 1.0])
    return builder, builder.add_group([f"{WRITTEN}\n#42", "7\n8\n#42"], [1.0, 1.0], question=SECRET)
