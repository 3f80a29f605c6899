"""Rewards: verifiers in processes of their own, each verification with a time limit that kills.

A verifier that hangs, dies or raises costs its own rollout and no other: each process holds one rollout
at a time, and nothing is shared between the processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from queue import LifoQueue
from types import TracebackType
from typing import Any

from pipeline.config import VerifyConfig
from pipeline.errors import VerifierError
from pipeline.records import Group, Judgement, Prompt
from pipeline.verifiers import check_name

LOAD_SECONDS = 120.0  # for importing a verifier; some packages take long on a cold disk


class VerifierPool:
    """`config.workers` verifier processes; a context manager. May be used from several threads.

    Attributes:
        name: the verifier's name.
        version: the version of its package, or a hash of the source file of a function of one's own.
    """

    def __init__(self, config: VerifyConfig) -> None:
        """Starts the first process; the others start when there is work for them.

        Raises:
            VerifierError: an unknown verifier, or one that cannot be imported.
        """
        check_name(config.verifier)
        self.name = config.verifier
        self._workers = [_Worker(config) for _ in range(config.workers)]
        self.version = self._workers[0].start()
        self._idle: LifoQueue[_Worker] = LifoQueue()  # those that run already are taken first
        for worker in reversed(self._workers):
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="verifier")

    def judge(self, groups: Sequence[Group], completions: Sequence[Sequence[str]]) -> list[list[Judgement]]:
        """Verifies every sample of every group.

        Args:
            completions: the decoded texts without special tokens, one per sample, in the samples' order.

        Returns:
            one Judgement per sample, in the same nesting.

        Raises:
            VerifierError: a process that was killed cannot be started again.
        """
        for group, texts in zip(groups, completions, strict=True):
            if len(group.samples) != len(texts):
                raise ValueError(f"{len(texts)} completions for a group of {len(group.samples)} samples")
        prompts = [group.prompt for group, texts in zip(groups, completions, strict=True) for _ in texts]
        texts_flat = [text for texts in completions for text in texts]
        judgements = iter(self.judge_each(prompts, texts_flat))
        return [[next(judgements) for _ in texts] for texts in completions]

    def judge_each(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Judgement]:
        """Verifies completions, each of its prompt, in their order; raises as `judge` does."""
        return list(self._threads.map(self._judge_one, prompts, completions))

    def _judge_one(self, prompt: Prompt, completion: str) -> Judgement:
        worker = self._idle.get()
        try:
            return worker.judge(prompt, completion)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kills the processes. Verifications that are under way fail."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Gone(Exception):
    """The process ended before it replied."""


class _Worker:
    """One verifier process, started again after it was killed or died."""

    def __init__(self, config: VerifyConfig) -> None:
        self._setup = {"verifier": config.verifier, "timeout_seconds": config.timeout_seconds}
        self._timeout = config.timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self) -> str:
        """Returns the verifier's version. Raises VerifierError if it does not load."""
        if self._closed:
            raise VerifierError("The verifier pool was closed while it worked. Run the night again.")
        # The parent's own path, so that both find the same modules; the working directory holds users' own.
        path = [entry or os.getcwd() for entry in [*sys.path, ""]]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.verifier_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # a kill reaches the verifier's own children, Ctrl-C only the parent
        )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        name = self._setup["verifier"]
        try:
            reply = _exchange(self._process, self._setup, LOAD_SECONDS)
        except TimeoutError:
            self.kill()
            raise VerifierError(
                f"Verifier `{name}` took more than {LOAD_SECONDS:g} s to import. Make its import lighter."
            ) from None
        except _Gone:
            raise VerifierError(
                f"The process of verifier `{name}` {_ending(self.kill())} while importing it. "
                f"Import it by hand to see why."
            ) from None
        if "error" in reply:
            self.kill()
            raise VerifierError(reply["error"])
        return str(reply["version"])

    def judge(self, prompt: Prompt, completion: str) -> Judgement:
        request = {"completion": completion, "prompt": asdict(prompt)}
        # Once more in a new process: the first may have died of what earlier rollouts left in it.
        for attempt in ("first", "last"):
            if self._process is None:
                self.start()
            assert self._process is not None
            try:
                reply = _exchange(self._process, request, self._timeout)
            except TimeoutError:
                self.kill()
                return Judgement(None, error=f"timed out after {self._timeout:g} s")
            except _Gone:
                code = self.kill()
                if attempt == "last":
                    return Judgement(None, error=_ending(code))
            else:
                return Judgement(reply.get("reward"), reply.get("parts", {}), reply.get("error", ""))
        raise AssertionError("the last attempt returns")

    def stop(self) -> None:
        """From any thread: ends the process, and whoever waits for it cleans up."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def kill(self) -> int:
        """Kills the process with its children; returns its exit code, its own if it ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return 0
        # the group's id is the process's, and cannot be another's before `wait` has reaped it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        return code


def _exchange(process: subprocess.Popen[bytes], message: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Sends one line and reads the reply; raises TimeoutError or _Gone. Neither direction can block."""
    assert process.stdin is not None
    assert process.stdout is not None
    request = json.dumps(message).encode() + b"\n"
    reply = b""
    poll = select.poll()
    poll.register(process.stdin, select.POLLOUT)
    poll.register(process.stdout, select.POLLIN)
    deadline = time.monotonic() + seconds
    while not reply.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        for pipe, _ in poll.poll(left * 1000):
            if pipe == process.stdout.fileno():
                chunk = os.read(pipe, 1 << 16)
                if not chunk:
                    raise _Gone
                reply += chunk
                continue
            try:
                request = request[os.write(pipe, request) :]
            except BrokenPipeError:
                raise _Gone from None
            if not request:
                poll.unregister(pipe)
    parsed: dict[str, Any] = json.loads(reply)
    return parsed


def _ending(code: int) -> str:
    name = f" ({signal.Signals(-code).name})" if -code in set(signal.Signals) else ""
    return f"died with exit code {code}{name}"
