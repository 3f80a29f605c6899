"""Data files of the lake, written with pyarrow: small, checksummed, complete or absent."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import LakeError
from pipeline.hashing import file_sha256

# So few that asking for a few rollouts by name reads little of the others; sizes grow by less than 1 %.
ROW_GROUP_ROWS = 2048


def write_data_file(table: pa.Table, path: Path) -> str:
    """Writes `table` beside `path`, then renames: a crash leaves nothing under the final name.

    Floats in lists are split into byte streams, which makes zstd twice as effective on them.

    Returns:
        the file's SHA-256.

    Raises:
        LakeError: the folder cannot be written or is full.
    """
    floats = [f.name for f in table.schema if f.type in (pa.list_(pa.float32()), pa.float32())]
    split = [f"{n}.list.element" if pa.types.is_list(table.schema.field(n).type) else n for n in floats]
    strings = [f.name for f in table.schema if pa.types.is_string(f.type)]
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table,
            partial,
            compression="zstd",
            row_group_size=ROW_GROUP_ROWS,
            use_dictionary=strings,
            use_byte_stream_split=split,
            write_page_checksum=True,
        )
        sha256 = file_sha256(partial)
        with partial.open("rb") as file:  # on the disk before a catalog names it
            os.fsync(file.fileno())
        os.replace(partial, path)
        return sha256
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LakeError(
            f"Cannot write {path}: {error.strerror or error}. "
            "Free space or mend the permissions, then run the command again; nothing was lost."
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
