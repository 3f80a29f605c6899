"""Rows of an import on their way: on disk, in parts that hold whole groups and fit into memory.

    lake/staging/<name>/        an import's rows, gone when it ends
    lake/staging/<name>.lock    held while it runs: what a killed import left is known by its free lock

Groups may lie scattered over dumps of any size, so rows are dealt out by their group's hash. The files are
written once and read once: Arrow's own stream format, which costs least for that.
"""

from __future__ import annotations

import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from pipeline import schema
from pipeline.errors import LakeError
from pipeline.formats import parquet_rows
from pipeline.imports.batches import STAGED, Batch
from pipeline.quarantine import quarantine_table

PART_BYTES = 48 << 20  # of the dumps; as staged rows about as much
MAX_PARTS = 512  # open files


class ImportStaging:
    """A context: the staging folder of one import, and what is in it. One writer, then one reader."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        """Nothing is written yet.

        Args:
            folder: of the lake.
            num_bytes: what the rows will take in memory, about.
        """
        self._name = uuid.uuid4().hex[:12]
        self._parent = folder / "staging"
        self.folder = self._parent / self._name
        self._lock = FileLock(self.folder.with_suffix(".lock"))
        self._num_parts = min(MAX_PARTS, 1 + num_bytes // PART_BYTES)
        self._writers: dict[str, pa.ipc.RecordBatchStreamWriter] = {}

    def __enter__(self) -> ImportStaging:
        with self._writing():
            self._parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            remove_abandoned(self._parent.parent)
            self.folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def add(self, batch: Batch) -> None:
        """Writes a batch.

        Raises:
            LakeError: the disk is full.
        """
        with self._writing():
            if batch.refused:
                self._write("refused", quarantine_table(batch.refused))
            if batch.staged.num_rows:
                self._deal(batch.staged)

    def finish(self) -> None:
        """Closes what was written; reading comes after.

        Raises:
            LakeError: the disk is full.
        """
        with self._writing():
            for writer in self._writers.values():
                writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LakeError(
                f"Cannot write {self.folder}: {error.strerror or error}. "
                "Free space or mend the permissions, then run the command again; nothing was changed."
            ) from error

    def parts(self) -> Iterator[pa.Table]:
        """The rows, schema STAGED, whole groups at a time; none twice."""
        for path in sorted(self.folder.glob("part-*")):
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                yield stream.read_all()
            path.unlink()

    def refused(self) -> Iterator[pa.Table]:
        """What goes to quarantine, a batch at a time."""
        path = self.folder / "refused"
        if path.exists():
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield pa.Table.from_batches([batch])

    def _deal(self, rows: pa.Table) -> None:
        if self._num_parts == 1:
            self._write("part-000", rows)
            return
        groups = rows["group_id"].combine_chunks().dictionary_encode()
        part_of = np.array(
            [zlib.crc32(name.encode()) % self._num_parts for name in groups.dictionary.to_pylist()]
        )
        parts = part_of[groups.indices.to_numpy()]
        order = np.argsort(parts, kind="stable")
        rows = rows.take(pa.array(order)).combine_chunks()
        found, starts = np.unique(parts[order], return_index=True)
        for part, start, end in zip(found, starts, [*starts[1:], len(order)], strict=True):
            self._write(f"part-{part:03}", rows.slice(start, end - start))

    def _write(self, name: str, rows: pa.Table) -> None:
        writer = self._writers.get(name)
        if writer is None:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            kind = schema.QUARANTINE if name == "refused" else STAGED
            writer = pa.ipc.new_stream(str(self.folder / name), kind, options=options)
            self._writers[name] = writer
        writer.write_table(rows)


def remove_abandoned(lake: Path) -> int:
    """Deletes what imports left in a lake's folder that were killed: nobody holds their lock.

    Returns:
        how many imports are running.
    """
    num_running = 0
    for path in (lake / "staging").glob("*.lock"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            num_running += 1
            continue
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
        lock.release()
    return num_running


def bytes_in_memory(files: list[Path]) -> int:
    """About what the rows of some dumps take.

    Raises:
        FormatError: a Parquet file is none, or is cut off.
    """
    return sum(
        parquet_rows.bytes_in_memory(path) if path.suffix == ".parquet" else path.stat().st_size
        for path in files
    )
