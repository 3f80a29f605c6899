"""A canonical dump of any size, its groups scattered over all of it; and a process that imports one.

`python big_dump.py write FILE MIB` and `python big_dump.py import FILE LAKE`, which prints its peak memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

GROUP_SIZE = 8
BODIES = 64


def write(path: Path, num_mib: int) -> int:
    """JSONL of about `num_mib` MiB, each rollout another; the number of groups.

    Row k is a rollout of group k modulo their number: the rows of a group lie as far apart as can be.
    """
    random = np.random.default_rng(0)
    bodies = []
    for _ in range(BODIES):
        length = int(np.clip(random.lognormal(np.log(600), 0.6), 8, 4000))
        entropies = random.gamma(0.4, 0.5, length).round(6)
        bodies.append(
            f"{json.dumps(random.integers(3, 90, length).tolist())[1:]}, "
            f'"completion_logprobs": {json.dumps([-0.01, *(-entropies).tolist()])}, '
            f'"completion_entropies": {json.dumps([0.5, *entropies.tolist()])}, "reward": 1.0}}\n'
        )
    num_groups = int(num_mib * 2**20 / np.mean([len(body) for body in bodies])) // GROUP_SIZE
    with path.open("w") as file:
        for index in range(GROUP_SIZE):
            for group in range(num_groups):
                body = bodies[(group * 7 + index * 13) % BODIES]
                head = f'{{"group_id": "g{group}", "sample_index": {index}, "prompt_ids": [{group % 90}, 5], '
                file.write(f'{head}"completion_ids": [{3 + (group + index) % 80}, {body}')
    return num_groups


def import_(path: Path, folder: Path) -> float:
    """Imports the dump into a new lake; the greatest resident memory of this process, MiB."""
    from pipeline.imports.core import import_rollouts, with_formats
    from pipeline.lake import Lake
    from pipeline.models import model_folder
    from pipeline.tokenization import load_tokenizer

    tokenizer = load_tokenizer(model_folder("arith"))
    done = import_rollouts(Lake.create(folder), with_formats([path]), tokenizer)
    assert done.rows.refused == 0
    # getrusage would count what the parent held when it started this process
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    task, dump, target = sys.argv[1:]
    print(write(Path(dump), int(target)) if task == "write" else import_(Path(dump), Path(target)))
