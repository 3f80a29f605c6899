"""Snapshots in use: whoever reads one by its number holds it, so that upkeep does not forget it meanwhile.

A hold is a shared file lock, which the kernel takes back when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hold(lake: Path, snapshot: int) -> Iterator[None]:
    """Holds a snapshot of the lake in this folder; on a lake that cannot be written there is no upkeep."""
    try:
        (lake / "held").mkdir(exist_ok=True)
        file = (lake / "held" / str(snapshot)).open("w")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def held(lake: Path) -> set[int]:
    """The snapshots that are held now; what is left of earlier holds is removed."""
    snapshots = set()
    for path in (lake / "held").glob("*"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                snapshots.add(int(path.name))
    return snapshots
