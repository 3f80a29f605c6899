"""A canonical dump of any size, its groups scattered over all of it; and a process that imports one.

`python big_dump.py write FILE MIB` (of JSONL; a file named .parquet has the same rows) prints the number of
groups, `python big_dump.py import FILE LAKE` its peak memory in MiB.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.json
import pyarrow.parquet as pq

GROUP_SIZE = 8
BODIES = 64


def write(path: Path, num_mib: int) -> int:
    """A dump, each rollout another; the number of groups.

    Row k is a rollout of group k modulo their number: the rows of a group lie as far apart as can be.

    Args:
        num_mib: its size as JSONL, about; as Parquet it is smaller.
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
    lines = (
        f'{{"group_id": "g{group}", "sample_index": {index}, "prompt_ids": [{group % 90}, 5], '
        f'"completion_ids": [{3 + (group + index) % 80}, {bodies[(group * 7 + index * 13) % BODIES]}'
        for index in range(GROUP_SIZE)
        for group in range(num_groups)
    )
    if path.suffix == ".parquet":
        write_parquet(path, lines)
    else:
        with path.open("w") as file:
            file.writelines(lines)
    return num_groups


def write_parquet(path: Path, lines: Iterator[str]) -> None:
    """The rows of JSONL, in row groups as pyarrow makes them of 8192 rows."""
    writer = None
    while chunk := list(islice(lines, 8192)):
        rows = pyarrow.json.read_json(io.BytesIO("".join(chunk).encode()))
        writer = writer or pq.ParquetWriter(path, rows.schema)
        writer.write_table(rows)
    assert writer is not None
    writer.close()


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
