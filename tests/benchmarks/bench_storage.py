"""What a token costs on the disk: the lake's data files against JSONL, .npy, TRL's Parquet and Arrow.

    echomine generate --lake /tmp/exact --config exact.toml     # with engine.entropy_bits = 23
    python tests/benchmarks/bench_storage.py /tmp/exact

Token ids, log-probs and entropies of all rollouts are written in each layout. TRL's completions Parquet
(pandas' defaults: snappy) has the texts of prompt and completion, the reward and the advantage; the layout
has no place for ids, log-probs and entropies.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
from measure import print_table

from pipeline.lake import Lake
from pipeline.parquet import write_data_file
from pipeline.precision import FLOAT32_BITS, rounded

TOKEN_COLUMNS = ("completion_ids", "completion_logprobs", "completion_entropies")


def with_bits(rows: pa.Table, logprob_bits: int, entropy_bits: int) -> pa.Table:
    for name, bits in (("completion_logprobs", logprob_bits), ("completion_entropies", entropy_bits)):
        lists = rows[name].combine_chunks()
        values = rounded(lists.flatten().to_numpy(), bits)
        column = pa.ListArray.from_arrays(lists.offsets, pa.array(values))
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


def lake_bytes(rows: pa.Table, folder: Path) -> dict[str, int]:
    """Compressed bytes of each token column in a data file, and of the whole file under `file`."""
    path = folder / "rollouts.parquet"
    write_data_file(rows, path)
    metadata = pq.read_metadata(path)
    sizes = {"file": path.stat().st_size}
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


def jsonl_bytes(tokens: pa.Table) -> int:
    return sum(len(json.dumps(row)) + 1 for row in tokens.to_pylist())


def npy_bytes(tokens: pa.Table) -> int:
    """A file for each rollout and array, as in the authors' dump of entropies."""
    total = 0
    for row in tokens.to_pylist():
        for name, values in row.items():
            file = io.BytesIO()
            np.save(file, np.asarray(values, np.int32 if name == "completion_ids" else np.float32))
            total += file.tell()
    return total


def arrow_bytes(tokens: pa.Table, folder: Path, compression: str) -> int:
    path = folder / f"tokens-{compression}.arrow"
    feather.write_feather(tokens, path, compression=compression)
    return path.stat().st_size


def plain_parquet_bytes(tokens: pa.Table, folder: Path) -> int:
    """pyarrow's and pandas' defaults: snappy and dictionaries."""
    pq.write_table(tokens, folder / "plain.parquet")
    return (folder / "plain.parquet").stat().st_size


def trl_bytes(lake: Lake, folder: Path) -> int:
    with lake.reader() as reader:
        rows = reader.table(
            """
            select policy_version as step, prompts.messages as prompt, completion, reward as reward_function,
                reward - avg(reward) over (partition by group_id) as advantage
            from rollouts left join prompts using (prompt_id)
            """
        )
    path = folder / "completions_00000.parquet"
    pq.write_table(rows, path, compression="snappy")  # what pandas.DataFrame.to_parquet does
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lake", type=Path, help="of rollouts whose entropies were stored with all bits")
    options = parser.parse_args()
    lake = Lake.open(options.lake)
    with lake.reader() as reader:
        rows = reader.table("from rollouts order by run_id, group_id, sample_index")
    tokens = rows.select(TOKEN_COLUMNS)
    count = len(rows["completion_ids"].combine_chunks().flatten())
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for text, bits in (
            ("lake, all bits", (FLOAT32_BITS, FLOAT32_BITS)),
            ("lake, entropies of 10 bits (default)", (FLOAT32_BITS, 10)),
            ("lake, log-probs and entropies of 10 bits", (10, 10)),
        ):
            sizes = lake_bytes(with_bits(rows, *bits), folder)
            parts = [sizes[name] for name in TOKEN_COLUMNS]
            table.append((text, sum(parts), *parts))
        table += [
            ("JSONL", jsonl_bytes(tokens)),
            (".npy", npy_bytes(tokens)),
            ("Parquet as pandas writes it", plain_parquet_bytes(tokens, folder)),
            ("Arrow (Feather, lz4)", arrow_bytes(tokens, folder, "lz4")),
            ("Arrow, uncompressed", arrow_bytes(tokens, folder, "uncompressed")),
            ("TRL's completions Parquet: texts only", trl_bytes(lake, folder)),
        ]
    print(f"{rows.num_rows} rollouts, {count} completion tokens")
    print_table(
        ("layout", "bytes/token", "ids", "log-probs", "entropies"),
        [(text, *(f"{size / count:.2f}" for size in sizes)) for text, *sizes in table],
    )


if __name__ == "__main__":
    main()
