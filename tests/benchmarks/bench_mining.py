"""Mining against its size, against a plain loop, and against the layout of the authors' release.

    python tests/benchmarks/bench_mining.py --tokens 10_000_000 100_000_000 --folder /tmp/lakes

Each mining is a process of its own, which opens the lake, warms up with another mining, and then mines with
settings that were not mined before, clips written: seconds, processor seconds (what the seconds would be if
nothing else ran lies between them and half of them, on two cores) and the peak of resident memory.
`resplit` splits the successes again at newlines, from their token columns, which chooses the clips of
`again`; its memory is also that of transformers and torch. `news` mines one more night of 1 % in the same
lake. The two others read the same groups from the Parquet files in a plain Python loop over the token
columns, and from JSON and .npy files with numpy; both on `--slice-tokens`, scaled by tokens. Neither looks
for copies, and neither writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import synthetic_lake
from measure import peak_mebibytes, print_table

from pipeline.config import MiningConfig
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.steps import DELIMITER

SIDES = ("first", "again", "resplit", "news", "loop", "json + .npy")


def timed(work: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Seconds of `work(number)`, median and least, and least processor seconds, after one that warms up."""
    work(0)
    walls, processors = [], []
    for number in range(1, repeats + 1):
        wall, processor = time.perf_counter(), time.process_time()
        work(number)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {"median": median(walls), "least": min(walls), "processor": min(processors)}


def fresh(number: int, delimiter: str | None = None) -> MiningConfig:
    """Settings that nobody mined with, and that choose the same clips."""
    return MiningConfig(min_step_entropy=1e-9 * (1 + number) * (time.time() % 1), delimiter=delimiter)


def measure_mining(
    folder: Path, repeats: int, since: int | None, delimiter: str | None = None
) -> dict[str, float]:
    lake, tokenizer = Lake.open(folder), synthetic_lake.tokenizer
    return timed(
        lambda number: mine(lake, fresh(number, delimiter), since_snapshot=since, tokenizer=tokenizer),
        repeats,
    )


def measure_first(folder: Path) -> dict[str, float]:
    """As on a lake that was copied here: every file's SHA-256 is computed beside the query."""
    (folder / "verified.json").unlink(missing_ok=True)
    lake = Lake.open(folder)
    wall, processor = time.perf_counter(), time.process_time()
    mine(lake, fresh(0))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"median": wall, "least": wall, "processor": processor}


def best_step(step_ends: list[int], entropies: list[float]) -> float:
    best = -1.0
    total = num_tokens = step = 0
    for position, entropy in enumerate(entropies, 1):
        total += entropy
        num_tokens += 1
        if position == step_ends[step]:
            best = max(best, total / num_tokens)
            total = num_tokens = 0
            step += 1
    return best


def loop(files: list[Path]) -> list[tuple[str, float]]:
    """(group, step entropy) of each all-success group's clip, one token after the other."""
    columns = ["group_id", "sample_index", "reward", "step_ends", "completion_ids", "completion_entropies"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(2048, columns=columns):
            for row in batch.to_pylist():
                groups.setdefault(row["group_id"], []).append(
                    {
                        "reward": row["reward"],
                        "entropy": best_step(row["step_ends"], row["completion_entropies"]),
                        "clip_ids": row["completion_ids"],
                    }
                )
    return sorted(
        (name, max(row["entropy"] for row in rows))
        for name, rows in groups.items()
        if min(row["reward"] for row in rows) >= 1
    )


def write_release_layout(files: list[Path], folder: Path) -> None:
    """`samples.json` and one .npy of entropies a sample; steps stand in the JSON, the texts are left out."""
    folder.mkdir()
    samples = []
    for path in files:
        for row in pq.read_table(path).to_pylist():
            np.save(folder / f"{row['rollout_id']}.npy", np.asarray(row["completion_entropies"], np.float32))
            samples.append(
                {
                    "sample_id": row["rollout_id"],
                    "step": row["policy_version"],
                    "group": row["group_id"],
                    "prompt_ids": row["prompt_ids"],
                    "response_ids": row["completion_ids"],
                    "reward": row["reward"],
                    "step_ends": row["step_ends"],
                    "entropy_tensor_file": f"{row['rollout_id']}.npy",
                }
            )
    (folder / "samples.json").write_text(json.dumps(samples))


def release_layout(folder: Path) -> list[tuple[str, float]]:
    """The same clips as `loop`, with numpy."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for sample in json.loads((folder / "samples.json").read_text()):
        entropies = np.load(folder / sample["entropy_tensor_file"])
        ends = np.asarray(sample["step_ends"])
        starts = np.concatenate([[0], ends[:-1]])
        means = np.add.reduceat(entropies, starts, dtype=np.float64) / (ends - starts)
        groups.setdefault(sample["group"], []).append((sample["reward"], float(means.max())))
    return sorted(
        (name, max(entropy for _, entropy in rows))
        for name, rows in groups.items()
        if min(reward for reward, _ in rows) >= 1
    )


def slice_of(folder: Path, num_tokens: int) -> tuple[Lake, list[Path]]:
    lake = Lake.open(folder) if folder.exists() else synthetic_lake.build(folder, num_tokens)
    return lake, sorted((lake.files / "main" / "rollouts").glob("*.parquet"))


def child(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    if options.child == "first":
        found = measure_first(folder)
    elif options.child in ("again", "resplit", "news"):
        delimiter = DELIMITER if options.child == "resplit" else None
        found = measure_mining(folder, options.repeats, options.since, delimiter)
    else:
        _, files = slice_of(folder, options.slice_tokens)
        release = folder.with_name(folder.name + "-release")
        if options.child == "json + .npy" and not release.exists():
            write_release_layout(files, release)
        sides = {"loop": lambda _: loop(files), "json + .npy": lambda _: release_layout(release)}
        found = timed(sides[options.child], 1)
    found["mebibytes"] = peak_mebibytes()
    print(json.dumps(found))


def in_child(
    side: str, folder: Path, options: argparse.Namespace, since: int | None = None
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", side, "--folder", str(folder)]
    command += ["--repeats", str(options.repeats), "--slice-tokens", str(options.slice_tokens)]
    command += [] if since is None else ["--since", str(since)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def add_news(lake: Lake, num_tokens: int) -> int:
    """One more night of 1 %; the snapshot before it."""
    with lake.reader() as reader:
        since = reader.snapshot
        number = reader.rows("select count(distinct run_id) as n from rollouts")[0]["n"]
    groups = max(1, num_tokens // 100 // 600 // synthetic_lake.GROUP_SIZE)
    lake.commit({"rollouts": synthetic_lake.night(10_000 + number, groups)})
    return since


def check_same_clips(folder: Path, options: argparse.Namespace) -> None:
    """All sides choose the clips that the mining records."""
    lake, files = slice_of(folder, options.slice_tokens)
    mined = mine(lake, fresh(0))
    again = mine(lake, fresh(0, DELIMITER), tokenizer=synthetic_lake.tokenizer)
    with lake.reader() as reader:
        sql = (
            "select group_id, clip_id, step_entropy from echo_clips where mining_id = $id order by clip_rank"
        )
        clips = reader.rows(sql, {"id": mined.mining_id})
        assert clips == reader.rows(sql, {"id": again.mining_id})
    others = [loop(files), release_layout(folder.with_name(folder.name + "-release"))]
    for found in others:
        chosen = dict(found)
        assert all(abs(chosen[c["group_id"]] - c["step_entropy"]) < 1e-5 for c in clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/echomine-bench"), help="keeps the lakes")
    parser.add_argument("--slice-tokens", type=int, default=2_000_000, help="of the two other sides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    rows = []
    per_token = 0.0
    for num_tokens in sorted(options.tokens):
        folder = options.folder / f"lake-{num_tokens}"
        lake = Lake.open(folder) if folder.exists() else synthetic_lake.build(folder, num_tokens)
        for side, since in (
            ("first", None),
            ("again", None),
            ("resplit", None),
            ("news", add_news(lake, num_tokens)),
        ):
            found = in_child(side, folder, options, since)
            rows.append((f"{num_tokens:,}", side, found, 1.0))
            per_token = found["processor"] / num_tokens if side == "again" else per_token
    for side in ("loop", "json + .npy"):
        found = in_child(side, options.folder / "slice", options)
        times = found["processor"] / options.slice_tokens / per_token
        rows.append((f"{options.slice_tokens:,}", side, found, times))
    check_same_clips(options.folder / "slice", options)
    print_table(
        ("tokens", "side", "median s", "least s", "processor s", "peak MiB", "processor s/token, again = 1"),
        [
            (
                tokens,
                side,
                *(f"{found[name]:.2f}" for name in ("median", "least", "processor")),
                f"{found['mebibytes']:.0f}",
                f"{times:.1f}" if side in ("loop", "json + .npy") else "",
            )
            for tokens, side, found, times in rows
        ],
    )


if __name__ == "__main__":
    main()
