"""An import in a process of its own: `python import_worker.py LAKE WHEN FILE…`.

WHEN it is killed: `staging` (in the middle of the dumps), or `commits` (after the second part is in the
lake). Or it is `meeting` another: they start at once, and when its rows are compared with the lake it gives
the other a second to come as far. It prints what it wrote, knew and refused.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The project first: tests/ has folders of the same names as the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sample_lake import character_tokenizer

import pipeline.imports.batches
import pipeline.imports.staging
from pipeline.imports import core
from pipeline.imports.batches import Batch
from pipeline.imports.staging import ImportStaging
from pipeline.lake import Lake


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def meet(lake: Lake, where: str, seconds: float) -> None:
    """Says that this process is there, and waits for another."""
    (lake.folder / f"{where}-{os.getpid()}").touch()
    end = time.monotonic() + seconds
    while len(list(lake.folder.glob(f"{where}-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)


def main() -> None:
    folder, when, *files = sys.argv[1:]
    lake = Lake.open(Path(folder))
    if when == "meeting":
        conflicts = core.conflicts

        def meeting(*arguments: Any) -> Mapping[int, str]:
            found = conflicts(*arguments)
            meet(lake, "compared", 1)
            return found

        core.conflicts = meeting  # type: ignore[assignment]
        meet(lake, "started", 60)
    else:
        kill(when)
    dumps = core.with_formats([Path(file) for file in files])
    done = core.import_rollouts(lake, dumps, character_tokenizer())
    print(done.rows.written, done.rows.known, done.rows.refused)


def kill(when: str) -> None:
    pipeline.imports.staging.PART_BYTES = 4096  # many parts
    pipeline.imports.batches.BATCH_ITEMS = 500
    seen = 0

    def counted(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            killed()

    if when == "staging":
        add = ImportStaging.add

        def adding(self: ImportStaging, batch: Batch) -> None:
            counted()
            add(self, batch)

        ImportStaging.add = adding  # type: ignore[method-assign]
    else:
        commit = core._committed
        core._committed = lambda *a: (counted(), commit(*a))[1]  # type: ignore[assignment]


if __name__ == "__main__":
    main()
