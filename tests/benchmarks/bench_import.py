"""Import, both formats, against the plain way: each row parsed and checked as Python values. One core.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/bench_import.py --groups 500

Completions are lines of words, log-normal around 600 tokens, with a log-prob and an entropy for each token;
rows are shuffled, so that groups lie scattered. Both sides end in a lake, with steps split and texts decoded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import medians, peak_mebibytes, print_table

from pipeline.errors import FormatError
from pipeline.hashing import file_sha256
from pipeline.imports.context import ImportContext
from pipeline.imports.core import import_rollouts, with_formats
from pipeline.imports.rows import completed_row
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.models import model_folder
from pipeline.quarantine import Refused
from pipeline.tokenization import load_tokenizer

GROUP_SIZE = 8
TEXT = "so the sum of two even numbers is even and then we add 17 to 25 which gives 42 . = + therefore x²"
COMMIT_ROWS = 4096


def dump_rows(num_groups: int, tokenizer: Any, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Canonical rows in any order."""
    random = np.random.default_rng(seed)
    sentences = [" ".join(random.choice(TEXT.split(), random.integers(4, 20))) + "\n" for _ in range(2000)]
    lines = [np.array(ids) for ids in tokenizer(sentences, add_special_tokens=False)["input_ids"]]
    for place in random.permutation(num_groups * GROUP_SIZE):
        group, index = divmod(int(place), GROUP_SIZE)
        length = int(np.clip(random.lognormal(np.log(600), 0.6), 8, 8000))
        chosen = random.integers(0, len(lines), length // 4)
        ids = np.concatenate([lines[line] for line in chosen])[:length]
        entropies = random.gamma(0.4, 0.5, len(ids)).astype(np.float32)
        yield {
            "group_id": f"group-{group}",
            "sample_index": index,
            "prompt_ids": [int(t) for t in lines[group % len(lines)]],
            "completion_ids": ids.tolist(),
            "completion_logprobs": [round(float(v), 6) for v in -entropies - 0.01],
            "completion_entropies": [round(float(v), 6) for v in entropies],
            "reward": float(random.integers(0, 2)),
        }


def write_jsonl(path: Path, num_groups: int, tokenizer: Any) -> int:
    """Writes the dump; the number of completion tokens."""
    tokens = 0
    with path.open("w") as file:
        for row in dump_rows(num_groups, tokenizer):
            file.write(json.dumps(row) + "\n")
            tokens += len(row["completion_ids"])
    return tokens


def write_parquet(path: Path, num_groups: int, tokenizer: Any) -> int:
    """The same rows, as pyarrow writes them."""
    rows = list(dump_rows(num_groups, tokenizer))
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2048)
    return sum(len(row["completion_ids"]) for row in rows)


def plainly(lake: Lake, path: Path, tokenizer: Any) -> None:
    """One pass for the sizes of groups, one that checks rows and commits groups as they become whole."""
    sizes: defaultdict[str, int] = defaultdict(int)
    for row in plain_rows(path):
        sizes[row["group_id"]] += 1
    missing = dict(sizes)
    context = ImportContext(tokenizer, file_sha256(path))
    waiting: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    whole: list[dict[str, Any]] = []
    refused: list[Refused] = []
    for number, row in enumerate(plain_rows(path), start=1):
        group = row["group_id"]
        try:
            waiting[group].append(completed_row(row, context) | {"group_size": sizes[group]})
        except FormatError as error:
            refused.append(Refused(str(error), f"{path.name}:{number}", row))
        missing[group] -= 1
        if not missing[group]:
            whole += waiting.pop(group)
        if len(whole) >= COMMIT_ROWS:
            ingest(lake, whole, [path.name] * len(whole), (), refused)
            whole, refused = [], []
    ingest(lake, whole, [path.name] * len(whole), (), refused)


def plain_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    else:
        with path.open() as lines:
            yield from map(json.loads, lines)


def peak_mib(side: str, path: Path, model: str) -> float:
    """The greatest resident memory of a process that imports the dump once."""
    command = [sys.executable, __file__, "--model", model, "--once", side, str(path)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="whose tokenizer")
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokenizer = load_tokenizer(model_folder(options.model))

    def imported(side: str, path: Path) -> None:
        folder = Path(tempfile.mkdtemp(dir=path.parent))
        lake = Lake.create(folder / "lake")
        if side == "row by row":
            plainly(lake, path, tokenizer)
        else:
            import_rollouts(lake, with_formats([path]), tokenizer)
        shutil.rmtree(folder)

    if options.once:
        imported(options.once[0], Path(options.once[1]))
        print(peak_mebibytes())
        return

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for write in (write_jsonl, write_parquet):
            path = Path(temporary) / f"dump.{write.__name__.removeprefix('write_')}"
            tokens = write(path, options.groups, tokenizer)
            sides = {side: partial(imported, side, path) for side in ("row by row", "import")}
            seconds = medians(sides, options.repeats)
            rows += [
                (
                    path.suffix.removeprefix("."),
                    side,
                    f"{path.stat().st_size / 2**20:.0f}",
                    f"{tokens:,}",
                    f"{seconds[side]:.2f}",
                    f"{tokens / seconds[side]:,.0f}",
                    f"{seconds['row by row'] / seconds[side]:.1f}",
                    f"{peak_mib(side, path, options.model):.0f}",
                )
                for side in sides
            ]
    header = ("dump", "side", "MiB", "completion tokens", "median seconds", "tokens/s", "speed-up")
    print_table((*header, "peak RSS, MiB"), rows)


if __name__ == "__main__":
    main()
