"""Fixtures that most tests of the pipeline share: an empty lake, made once and copied, on either catalog."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from postgres_server import Server

from pipeline.lake import Lake

ON_BOTH_CATALOGS = {"test_lake", "test_mine", "test_ingest", "test_set_aside"}
ON_POSTGRES = {"test_catalog_postgres"}
SLOWLY_ON_POSTGRES = {"test_maintenance", "test_importing"}  # of their many commits each is a round trip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "catalog" in metafunc.fixturenames:
        name = metafunc.module.__name__
        catalogs = [pytest.param("sqlite")] * (name not in ON_POSTGRES)
        if name in ON_BOTH_CATALOGS | ON_POSTGRES | SLOWLY_ON_POSTGRES:
            marks = [pytest.mark.slow] * (name in SLOWLY_ON_POSTGRES)
            catalogs.append(pytest.param("postgres", marks=marks))
        metafunc.parametrize("catalog", catalogs)


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty") / "lake"
    Lake.create(folder)
    return folder


@pytest.fixture(scope="session")
def empty_database(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a database that holds an empty lake's catalog."""
    postgres.execute("create database empty")
    Lake.create(tmp_path_factory.mktemp("postgres") / "lake", postgres.url("empty"))
    return "empty"


@pytest.fixture
def lake(catalog: str, empty: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Lake:
    folder = tmp_path / "lake"
    if catalog == "sqlite":
        shutil.copytree(empty, folder)
        return Lake.open(folder)
    postgres, template = (request.getfixturevalue(name) for name in ("postgres", "empty_database"))
    number = postgres.execute("select count(*) from pg_database")
    postgres.execute(f"create database lake_{number} template {template}")
    return Lake.create(folder, postgres.url(f"lake_{number}"))
