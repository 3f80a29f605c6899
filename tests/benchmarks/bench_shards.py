"""How fast shards become packed tensors on one core: `ShardStream` against Python rows.

    taskset -c 0 python tests/benchmarks/bench_shards.py

The export is generated: `--clips` clips of log-normal length in shards of 4,096 clips, the default, with
token ids of Zipf's law. Its files were just written, so they come from the page cache. The other hand is
`pq.read_table().to_pylist()` and a tensor for each row, in the order of the files, unchecked. `--cpu` counts
the processor's seconds instead of the clock's, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from measure import medians, print_table

from pipeline.exports.manifest import EXPORT_VERSION, replace_json
from pipeline.exports.shards import SHARD
from pipeline.parquet import write_data_file
from pipeline.shards import open_shards, read_shard
from trainer.shard_stream import ShardStream

TOKENIZER = "0" * 64
BATCH_TOKENS = 32_768
CLIPS_PER_SHARD = 4096


def generated_export(folder: Path, num_clips: int) -> None:
    rng = np.random.default_rng(0)
    files = []
    for first in range(0, num_clips, CLIPS_PER_SHARD):
        rows = generated_rows(rng, first, min(CLIPS_PER_SHARD, num_clips - first))
        path = folder / f"clips-{first // CLIPS_PER_SHARD:05d}.parquet"
        sha256 = write_data_file(rows, path)
        tokens = sum(len(pc.list_flatten(rows[name])) for name in ("prompt_ids", "clip_ids"))
        files.append({"file": path.name, "clips": rows.num_rows, "tokens": tokens, "sha256": sha256})
    facts = {"schema_version": EXPORT_VERSION, "tokenizer_hash": TOKENIZER, "dropped": {}}
    replace_json(folder / "manifest.json", {**facts, "clips": num_clips, "files": files})


def generated_rows(rng: np.random.Generator, first: int, num_rows: int) -> pa.Table:
    def lists(median: float) -> pa.ListArray:
        lengths = np.clip(rng.lognormal(np.log(median), 0.6, num_rows), 1, 4000).astype(np.int32)
        ids = np.minimum(rng.zipf(1.2, lengths.sum()), 150_000).astype(np.int32)
        return pa.ListArray.from_arrays(np.concatenate(([0], lengths.cumsum())).astype(np.int32), ids)

    return pa.table(
        [
            [hashlib.sha256(str(first + row).encode()).hexdigest()[:32] for row in range(num_rows)],
            lists(120),
            lists(300),
            rng.random(num_rows, dtype=np.float32),
            np.ones(num_rows),
            np.zeros(num_rows, np.int64),
            [TOKENIZER] * num_rows,
            np.ones(num_rows, np.float32),
        ],
        schema=SHARD,
    )


def streamed(folder: Path) -> int:
    stream = ShardStream(folder, TOKENIZER, batch_tokens=BATCH_TOKENS)
    return sum(len(batch.ids) for batch in stream)


def python_rows(folder: Path) -> int:
    num_tokens = 0
    for path in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(path, use_threads=False).to_pylist():
            num_tokens += len(torch.tensor(row["prompt_ids"] + row["clip_ids"], dtype=torch.int32))
    return num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=49_152)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generated_export(folder, args.clips)
        files = open_shards(folder, TOKENIZER).files
        contents = [file.path.read_bytes() for file in files]
        num_tokens = sum(file.num_tokens for file in files)
        sides: dict[str, Callable[[], object]] = {
            "`ShardStream`, shuffled, SHA-256 checked": lambda: streamed(folder),
            "of that: SHA-256": lambda: [hashlib.sha256(content).digest() for content in contents],
            "of that: bytes, SHA-256 and Parquet to Arrow": lambda: [read_shard(file) for file in files],
            "`to_pylist()` and `torch.tensor`, row by row": lambda: python_rows(folder),
        }
        seconds = medians(sides, args.repeats, time.process_time if args.cpu else time.perf_counter)
        rows = [(side, f"{taken:.2f}", f"{num_tokens / taken / 1e6:.1f}") for side, taken in seconds.items()]
        size = sum(map(len, contents))
        print(f"{args.clips} clips, {num_tokens} tokens in {len(files)} files of {size} bytes")
        print_table(("side", "CPU seconds" if args.cpu else "seconds", "M tokens/s"), rows)


if __name__ == "__main__":
    main()
