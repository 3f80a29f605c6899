"""The report of a night, written from what the night left in the lake and in its run folder."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from pipeline.errors import LakeError
from pipeline.lake import Lake
from pipeline.report import write_report
from pipeline.run_notes import noted_at, noted_runs, read_notes
from pipeline.tokenization import load_tokenizer
from pipeline.training_metrics import read_training


def write_night_report(lake: Lake, run_id: str, snapshot: int | None = None) -> Path:
    """Writes `runs/<run>/report.html` of a run that has been mined.

    Args:
        snapshot: the lake as of it, into a file of its own, `report-snapshot-<N>.html`.

    Raises:
        LakeError: no such run or snapshot, or the run was not mined yet.
        MiningError: the run was not mined by then.
    """
    folder = lake.folder / "runs" / run_id
    facts = read_notes(folder)
    if "mining_id" not in facts:
        raise LakeError(
            f"Run {run_id} in {lake.folder} was not mined yet. Run `echomine nightly` to finish it."
        )
    trained = folder / str(facts.get("training_id"))
    training = None
    if (trained / "training.json").is_file():
        training = json.loads((trained / "training.json").read_text())
        training["metrics"] = read_training(trained).steps
    return write_report(
        lake,
        run_id,
        facts["mining_id"],
        load_tokenizer(Path(facts["model_folder"])),
        folder / ("report.html" if snapshot is None else f"report-snapshot-{snapshot}.html"),
        {"generate_seconds": 0.0}
        | {name: facts[name] for name in ("generate_seconds", "score_seconds") if name in facts},
        training,
        facts.get("export_dropped"),
        snapshot,
    )


def run_of_night(lake: Lake, night: date | None) -> str:
    """The run of a night (the newest night by default; of several runs the one begun last).

    Raises:
        LakeError: the lake has no such night.
    """
    runs = []
    for folder in noted_runs(lake.folder):
        facts = read_notes(folder)
        if "night" in facts and (night is None or facts["night"] == night.isoformat()):
            runs.append((facts["night"], noted_at(folder), folder.name))
    if not runs:
        raise LakeError(
            f"The lake in {lake.folder} has no night{f' {night}' if night else ' yet'}. "
            "Run `echomine nightly` first."
        )
    return max(runs)[2]
