"""Which data files are as they were written: their SHA-256, read again only where something may have changed.

`verified.json` in the lake's folder notes size, times and inode of each data file at the moment when its
content was last known: when it was written, or when its hash was found right. A file of which all of them
are the same has not been written to since, so reading it again would tell nothing but a fault of the disk,
which `echomine doctor` looks for. Copied to another place, a file is another one, and is read.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.hashing import file_sha256

MISSING = "is missing"
CHANGED = "is not as it was written (its SHA-256 differs)"
THREADS = 2  # hashing waits for no lock of Python's


@dataclass(frozen=True)
class DamagedFile:
    path: str
    problem: str


class Verification:
    """A look at data files that goes on in threads while their queries run.

    Args:
        folder: the lake's.
        sha256_of: by path, relative to `folder`.
        everything: also what is noted as unchanged.
    """

    def __init__(self, folder: Path, sha256_of: Mapping[str, str], everything: bool = False) -> None:
        self._folder = folder
        noted = {} if everything else _noted(folder)
        self._missing = [path for path in sha256_of if not (folder / path).is_file()]
        unsure = {
            path: sha256
            for path, sha256 in sha256_of.items()
            if path not in self._missing and noted.get(path) != [sha256, *_stamp(folder / path)]
        }
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="sha256")
        self._found = {path: self._pool.submit(_stamped_sha256, folder / path) for path in unsure}
        self._expected = unsure

    def damaged(self) -> list[DamagedFile]:
        """Waits for the threads; what they found right is noted."""
        right, wrong = [], [DamagedFile(path, MISSING) for path in self._missing]
        for path, found in self._found.items():
            sha256, stamp = _result(found)
            if sha256 == self._expected[path]:
                right.append((path, [sha256, *stamp]))
            else:
                wrong.append(DamagedFile(path, CHANGED))
        self._pool.shutdown()
        if right:
            _note(self._folder, dict(right))
        return sorted(wrong, key=lambda file: file.path)


def note_written(folder: Path, sha256_of: Mapping[str, str]) -> None:
    """Notes files that were just written and hashed; paths are relative to the lake's `folder`."""
    _note(folder, {path: [sha256, *_stamp(folder / path)] for path, sha256 in sha256_of.items()})


def forget(folder: Path, paths: Iterable[str]) -> None:
    """Drops the notes of files that are gone."""
    noted, gone = _noted(folder), set(paths)
    _write(folder, {path: note for path, note in noted.items() if path not in gone})


def _result(found: Future[tuple[str, list[int]]]) -> tuple[str, list[int]]:
    try:
        return found.result()
    except OSError:  # it went away, or the disk gave no bytes: not as it was written, either way
        return "", []


def _stamped_sha256(path: Path) -> tuple[str, list[int]]:
    before = _stamp(path)  # of what is then read: a change in between shows at the next look
    return file_sha256(path), before


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _noted(folder: Path) -> dict[str, list[object]]:
    try:
        noted = json.loads((folder / "verified.json").read_bytes())
    except (OSError, ValueError):  # without notes everything is read
        return {}
    return noted if isinstance(noted, dict) else {}


def _note(folder: Path, notes: Mapping[str, list[object]]) -> None:
    _write(folder, {**_noted(folder), **notes})


def _write(folder: Path, notes: Mapping[str, list[object]]) -> None:
    """Replaced at once. Of two writers one may lose its notes; those files are then read once more."""
    partial = folder / f".verified.json.{uuid.uuid4().hex}.partial"
    partial.write_text(json.dumps(notes))
    os.replace(partial, folder / "verified.json")
