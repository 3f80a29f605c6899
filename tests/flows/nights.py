"""A short night as several tests have the command run it, and what they ask of its lake."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline.lake import Lake

ECHOMINE = str(Path(sys.executable).with_name("echomine"))

NIGHT = """
max_prompts = 24
night = "2026-05-31"
[sampling]
group_size = 4
max_tokens = 64
[train]
optim_steps = {optim_steps}
prompts_per_step = 2
group_size = 4
clips_per_step = 4
[engine]
batch_rollouts = 16
"""


def night_config(path: Path, optim_steps: int, engine: str = "") -> Path:
    """Writes the night's config to `path`; `engine` is what else its section [engine] says."""
    path.write_text(NIGHT.format(optim_steps=optim_steps) + engine)
    return path


def rows(lake: Path, query: str) -> list[dict[str, Any]]:
    with Lake.open(lake).reader() as reader:
        return reader.rows(query)
