"""A real `vllm serve` on the CPU for tests, and small servers that forward to it or misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

MODEL = Path(__file__).parents[1] / "data" / "arith" / "model"
START_SECONDS = 600.0  # three processes import torch; seconds on an idle machine
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling for the first log-probs takes longer than all tests
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def vllm_serve(model: Path, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """The base URL of a server that answers, with float32 weights; it is killed in the end."""
    port = free_port()
    # `vllm serve` as the package vllm-cpu installs it dies looking for a package named vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "arith"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32", *options]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **OFFLINE},
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(server, url, log)
            yield f"{url}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.killpg(server.pid, signal.SIGKILL)  # with its engine's processes, which may still start
            server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=1.0, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"vllm serve did not start:\n{log.read_text(errors='replace')[-3000:]}")


@dataclass
class Answer:
    """An answer on its way from the real server; `status` 0 hangs up without one."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @json.setter
    def json(self, value: Any) -> None:
        self.body = json.dumps(value).encode()  # NaN is written as NaN


Spoil = Callable[[dict[str, Any], Answer], None]


class Relay:
    """A server in this process that passes requests on to a real one, and may spoil its answers.

    Attributes:
        spoil: gets the request's JSON and the answer to change; called for `/v1/completions` alone, the
            engine's probe excepted unless `spoil_probe`.
        forward_model: the model that the real server is asked for, whatever the request says.
        num_completions: requests for completions so far, probes not counted.
        keys: the `Authorization` headers seen.
    """

    def __init__(
        self,
        upstream: str,
        spoil: Spoil | None = None,
        spoil_probe: bool = False,
        forward_model: str | None = None,
        port: int = 0,
    ) -> None:
        self.upstream = upstream.removesuffix("/v1")
        self.spoil, self.spoil_probe = spoil, spoil_probe
        self.forward_model = forward_model
        self.client = httpx.Client(timeout=60.0, trust_env=False, verify=False)
        self.num_completions = 0
        self.keys: set[str | None] = set()
        self.others: dict[str, Answer] = {}  # instead of the real answer, by path
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens at the port any more."""
        self.server.shutdown()
        self.server.server_close()
        self.client.close()

    def _handler(relay) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass_on(b"")

            def do_POST(self) -> None:
                self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def _pass_on(self, body: bytes) -> None:
                try:
                    answer = relay.answer(self.command, self.path, body, self.headers["Authorization"])
                except (httpx.HTTPError, RuntimeError):
                    if relay.client.is_closed:  # it was stopped meanwhile
                        return
                    raise
                if answer.status == 0:
                    return
                with contextlib.suppress(OSError):  # the client may be gone
                    self.send_response(answer.status)
                    self.send_header("Content-Length", str(len(answer.body)))
                    self.end_headers()
                    self.wfile.write(answer.body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def answer(self, method: str, path: str, body: bytes, key: str | None) -> Answer:
        self.keys.add(key)
        if path in self.others:
            return self.others[path]
        sent = json.loads(body) if body else {}
        if self.forward_model is not None and body:
            sent["model"] = self.forward_model
        response = self.client.request(method, self.upstream + path, json=sent if body else None)
        answer = Answer(response.status_code, response.content)
        is_probe = sent.get("top_k") == 1
        if path == "/v1/completions":
            self.num_completions += not is_probe
            if self.spoil and (self.spoil_probe or not is_probe):
                self.spoil(sent, answer)
        return answer
