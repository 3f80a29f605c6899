"""An import in a process of its own that is killed: `python import_worker.py LAKE WHEN FILE…`.

WHEN is `staging` (in the middle of the dumps), or `commits` (after the second part is in the lake).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

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


def main() -> None:
    folder, when, *files = sys.argv[1:]
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
    dumps = core.with_formats([Path(file) for file in files])
    core.import_rollouts(Lake.open(Path(folder)), dumps, character_tokenizer())


if __name__ == "__main__":
    main()
