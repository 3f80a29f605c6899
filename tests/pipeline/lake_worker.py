"""What other processes do to a lake while tests look on: `python lake_worker.py TASK FOLDER …`."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.errors import LakeError
from pipeline.lake import Lake
from pipeline.lake_writer import Writer
from pipeline.rollouts import rollout_table


def rollout(group_id: str, sample_index: int, num_tokens: int = 2) -> dict[str, Any]:
    """A successful rollout with one step."""
    return {
        "group_id": group_id,
        "prompt_id": f"prompt of {group_id}",
        "run_id": "run",
        "origin": "policy",
        "model": "small",
        "policy_version": 0,
        "sample_index": sample_index,
        "group_size": 2,
        "prompt_ids": [1, 2],
        "completion_ids": [7 + sample_index + i % 5 for i in range(num_tokens)],
        "completion_entropies": [0.25 + i % 3 for i in range(num_tokens)],
        "entropy_kind": "full_vocab",
        "finish_reason": "stop",
        "reward": 1.0,
        "step_ends": [num_tokens],
    }


def write(folder: Path, name: str, count: int) -> None:
    lake = Lake.open(folder)
    for number in range(count):
        lake.commit({"rollouts": rollout_table([rollout(f"{name}-{number}", i) for i in (0, 1)])})


def read(folder: Path, count: int) -> None:
    """Whole groups, never fewer than before."""
    lake, before = Lake.open(folder), 0
    for _ in range(count):
        with lake.reader() as reader:
            sizes = reader.rows("select count(*) as n from rollouts group by group_id")
        assert all(row["n"] == 2 for row in sizes), "half a group"
        assert len(sizes) >= before, "groups vanished"
        before = len(sizes)


def maintain(folder: Path, count: int) -> None:
    """The command, again and again."""
    from flows.cli import main

    for _ in range(count):
        assert main(["maintain", "--json", "--lake", str(folder)]) == 0


def die(folder: Path) -> None:
    """Killed between the data file and the commit."""

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    lake = Lake.open(folder)
    Writer._insert = killed  # the row in `files`, right after the data file was registered
    lake.commit({"rollouts": rollout_table([rollout("lost", i) for i in (0, 1)])})


def set_aside(folder: Path, after: str) -> None:
    """Killed before the file is moved, or after `moved` it, or after `ended` it in the catalog."""
    import pipeline.set_aside

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    step = {"nothing": "_moved", "moved": "_end", "ended": "_quarantine"}[after]
    setattr(pipeline.set_aside, step, killed)
    pipeline.set_aside.set_aside(Lake.open(folder))


def fill(folder: Path) -> None:
    """No file may grow beyond 64 KiB: like a full disk, writing ends in an OSError."""
    lake = Lake.open(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    rows = [rollout("big", i, num_tokens=300_000) for i in (0, 1)]
    for number, row in enumerate(rows):
        row["completion_ids"] = [(7919 * i * (i + number)) % 65_537 for i in range(300_000)]
    try:
        lake.commit({"rollouts": rollout_table(rows)})
    except LakeError as error:
        print(error)
        raise SystemExit(2) from error


if __name__ == "__main__":
    task, target, *rest = sys.argv[1:]
    if task == "write":
        write(Path(target), rest[0], int(rest[1]))
    elif task == "read":
        read(Path(target), int(rest[0]))
    elif task == "maintain":
        maintain(Path(target), int(rest[0]))
    elif task == "die":
        die(Path(target))
    elif task == "set_aside":
        set_aside(Path(target), rest[0])
    elif task == "fill":
        fill(Path(target))
    elif task == "create":
        Lake.create(Path(target))
