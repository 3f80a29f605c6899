"""Fixtures for tests of the command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dumps
import pytest
from folder_contents import contents
from vllm_server import free_port

from flows.cli import main
from flows.embedded import prefect_server

Refused = Callable[..., str]
ImportDump = Callable[[list[Any]], tuple[int, str, str]]


@pytest.fixture(scope="session")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported and mined lake. It is shared: tests only read it, and no mistake may change it."""
    folder = tmp_path_factory.mktemp("mined")
    dump = dumps.write_jsonl(folder / "night.jsonl", dumps.night())
    assert main(["import", "rollouts", str(dump), *dumps.into(folder / "lake")]) == 0
    assert main(["mine", "--lake", str(folder / "lake")]) == 0
    return folder / "lake"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a command with a Prefect home of its own and no server to share."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return clean | {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server for nights that are killed: one of their own would go on after each kill."""
    url = f"http://127.0.0.1:{free_port()}/api"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with prefect_server(url):
            patch.undo()
            yield url


@pytest.fixture
def refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs the command, which must refuse and leave every file as it was; returns its one line."""
    monkeypatch.setenv("ECHOMINE_LAKE", str(lake))

    def run(*arguments: object, exit_code: int = 2) -> str:
        before = contents(tmp_path, lake)
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        output, errors = capfd.readouterr()
        assert code == exit_code, errors
        assert output == ""
        assert errors.count("\n") == 1, errors
        assert errors.startswith("echomine: ")
        assert "Traceback" not in errors
        assert contents(tmp_path, lake) == before
        return errors

    return run


@pytest.fixture
def import_dump(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> ImportDump:
    """Imports rows into `tmp_path / "lake"`; returns exit code, output and errors."""

    def run(rows: list[Any]) -> tuple[int, str, str]:
        dump = dumps.write_jsonl(tmp_path / "dump.jsonl", rows)
        capfd.readouterr()
        code = main(["import", "rollouts", str(dump), *dumps.into(tmp_path / "lake")])
        return code, *capfd.readouterr()

    return run
