"""Snapshots in use: whoever reads one by its number holds it, so that upkeep does not forget it meanwhile.

A hold is a shared file lock, which the kernel takes back when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def hold(lake: Path, snapshot: int) -> Iterator[None]:
    """Holds a snapshot of the lake in this folder; on a lake that cannot be written there is no upkeep."""
    try:
        file = _locked(lake / "held" / str(snapshot))
    except OSError:
        yield
        return
    with file:
        try:
            yield
        finally:
            _remove_unless_held(file)


def held(lake: Path) -> set[int]:
    """The snapshots that are held now; what killed holders left behind is removed."""
    return {int(path.name) for path in (lake / "held").glob("*") if _is_held(path)}


def _is_held(path: Path) -> bool:
    while True:
        try:
            file = path.open()
        except FileNotFoundError:
            return False
        with file:
            if not _remove_unless_held(file):
                return True


def _locked(path: Path) -> IO[str]:
    path.parent.mkdir(exist_ok=True)
    while True:
        file = path.open("w")
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(path, file):
            return file
        file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether nobody removed it between opening and locking: a hold on a removed file is seen by nobody."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unless_held(file: IO[str]) -> bool:
    """Whether no other has a lock on it; then it is gone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if _is_at(Path(file.name), file):  # else its place may be another's by now
        Path(file.name).unlink()
    return True
