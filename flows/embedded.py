"""Running flows where no Prefect server is: its own embedded one for a single night, a real one to serve."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel

from flows.progress import console
from pipeline.config import MaintainConfig, NightlyConfig
from pipeline.errors import BusyError, ConfigError

SERVER_START_SECONDS = 120
DEFAULT_API_URL = "http://127.0.0.1:4200/api"

# Set before Prefect is imported; whatever the user set already stays.
_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(SERVER_START_SECONDS),
}


def run_nightly(config: NightlyConfig, lake: Path) -> dict[str, Any]:
    """Runs one night in this process; Prefect's embedded server keeps its record.

    Raises:
        EchoMineError: what a stage raised.
    """
    _prepare(quiet=True)
    if not os.environ.get("PREFECT_API_URL"):
        console.print("Starting Prefect's embedded server (8 to 20 s) …")
    from flows.nightly import nightly

    return dict(nightly(config, lake).__dict__)


def serve_nightly(config: NightlyConfig, lake: Path, cron: str) -> None:
    """Keeps the nightly flow scheduled until interrupted; starts a Prefect server if none answers.

    Raises:
        ConfigError: `cron` is no cron expression.
        BusyError: the server's port is taken by something else.
    """
    _serve("nightly", config, lake, cron)


def serve_maintain(config: MaintainConfig, lake: Path, cron: str) -> None:
    """Keeps the lake's upkeep scheduled, like `serve_nightly`."""
    _serve("maintain", config, lake, cron)


def _serve(name: str, config: BaseModel, lake: Path, cron: str) -> None:
    """Schedules the flow `name` of the module `flows.<name>`."""
    _prepare(quiet=False)
    url = os.environ.setdefault("PREFECT_API_URL", DEFAULT_API_URL)
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron, timezone="UTC")
    except ValueError:
        raise ConfigError(
            f'--cron {cron!r} is no cron expression. Give five fields, like "0 2 * * *".'
        ) from None
    with prefect_server(url):
        from prefect.types.entrypoint import EntrypointType

        flow = getattr(importlib.import_module(f"flows.{name}"), name)
        console.print(f'Serving the flow `{name}` at {url}, next by cron "{cron}" (UTC). Stop with Ctrl-C.')
        flow.serve(
            name=name,
            entrypoint_type=EntrypointType.MODULE_PATH,  # found wherever the command was started
            cron=cron,
            limit=1,
            parameters={"config": config.model_dump(mode="json"), "lake": str(lake)},
            pause_on_shutdown=False,
        )


def _prepare(quiet: bool) -> None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if quiet:
        # A stage's error reaches the user as one line; Prefect would print its traceback as well.
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")


@contextmanager
def prefect_server(url: str) -> Iterator[None]:
    """The server at `url`: the one that answers there, or one started for as long as this runs."""
    if _answers(url):
        console.print(f"Using the Prefect server at {url}.")
        yield
        return
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 4200
    if host not in ("127.0.0.1", "localhost"):
        raise ConfigError(f"No Prefect server answers at {url}. Start it, or unset PREFECT_API_URL.")
    with socket.socket() as probe:
        if probe.connect_ex((host, port)) == 0:
            raise BusyError(
                f"Port {port} on {host} is in use by something that is no Prefect server. "
                f"Free it, or choose another with PREFECT_API_URL=http://{host}:PORT/api."
            )
    console.print(f"Starting a Prefect server on port {port} …")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + SERVER_START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BusyError(
                    f"The Prefect server did not start on port {port}. "
                    f"Try `prefect server start --port {port}` to see why."
                )
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _answers(url: str) -> bool:
    """Whether a Prefect server, and not another one, answers."""
    try:
        return httpx.get(f"{url}/admin/version", timeout=2).text.strip('"\n').startswith("3.")
    except httpx.HTTPError:
        return False
