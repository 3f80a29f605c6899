"""`--nproc`: the command once more in several processes, with the environment that torchrun gives."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, ModelError

GRACE_SECONDS = 20  # for the others to end, and the first one to say why, where one process ended


def check_devices(num_processes: int, device: str) -> None:
    """
    Args:
        num_processes: `--nproc`; where torchrun started this one, its count on this machine stands instead.

    Raises:
        ConfigError: there are fewer GPUs, or on a CPU fewer cores, or all would share one GPU.
    """
    import torch

    from pipeline.models import is_on_cuda

    by_torchrun = {"WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()  # vLLM leaves the second behind
    option = "--nproc-per-node" if by_torchrun else "--nproc"
    if by_torchrun:
        num_processes = int(os.environ["LOCAL_WORLD_SIZE"])
    on_cuda = is_on_cuda(device)
    if num_processes > 1 and ":" in device:
        raise ConfigError(
            f"engine.device = {device} is one GPU, and {option} {num_processes} gives each process its own. "
            f"Set engine.device to {device.partition(':')[0]} or auto."
        )
    there = torch.cuda.device_count() if on_cuda else len(os.sched_getaffinity(0))
    if num_processes > there:
        if by_torchrun and os.environ["LOCAL_RANK"] != "0":
            time.sleep(GRACE_SECONDS)  # the first one says it for all, and torchrun ends the others
        kind = "GPUs" if on_cuda else "cores"
        raise ConfigError(
            f"{option} {num_processes} is more than the {there} {kind} of this machine. Give {there} or less."
        )


def run_processes(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `echomine ARGUMENTS` in each process, of which only the first one speaks.

    Returns:
        the first one's exit code.

    Raises:
        ModelError: another process failed, with its last line, or one was killed.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    # It warns of each process that it ends beside a killed one, and our own line says what happened.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as logs:
        running = spawn(  # type: ignore[no-untyped-call]
            _process, args=(num_processes, port, logs, list(arguments)), nprocs=num_processes, join=False
        )
        try:
            while not running.join(grace_period=GRACE_SECONDS):
                pass
        except ProcessExitedException as error:
            code = running.processes[0].exitcode or 0
            # 1: the others' end took it by surprise, or it is a fault of ours; else it has said why
            if code > 1 or (code == 1 and error.error_index == 0):
                return int(code)
            raise _failed(error, num_processes, Path(logs)) from None
        except KeyboardInterrupt:  # the first process has it too, and says so
            for process in running.processes:
                process.join(GRACE_SECONDS)
            return int(running.processes[0].exitcode or 1)
    return 0


def _failed(error: Any, num_processes: int, logs: Path) -> ModelError:
    """What ended a process that is not the first one, or was killed."""
    who = f"Process {error.error_index} of {num_processes}"
    if error.signal_name is not None or error.exit_code < 0:
        name = error.signal_name or signal.Signals(-error.exit_code).name
        return ModelError(f"{who} was ended by {name}. Start the training again to go on.")
    lines = (logs / str(error.error_index)).read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), f"it ended with {error.exit_code}.")
    return ModelError(f"{who} failed: {last.removeprefix('echomine: ')}")


def _process(rank: int, num_processes: int, port: int, logs: str, arguments: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if rank > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.dup2(os.open(Path(logs) / str(rank), os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))
    from flows.cli import main

    sys.exit(main(arguments))
