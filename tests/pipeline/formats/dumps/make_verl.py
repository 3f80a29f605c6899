"""Writes the verl fixtures with verl's own dump functions: `pip install verl==0.9.1` beside its imports.

    python make_verl.py

The texts and scores are made up; the files are what `RayPPOTrainer` (v0) and the v1 trainer write of them.
The v1 trainer passes the uid of each row as its only extra column, in the order of the uids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1 import trainer_base

FOLDER = Path(__file__).parent / "verl"
QUESTIONS = ("17+25", "18+24")
COMPLETIONS = ("10+20=30\n7+5=12\n#42", "17+20=37\n37+5=42\n#42")
UIDS = ("1f0e8c52-7f9c-4f0b-9a57-6d1b5f1f3c11", "c0ffee00-25b1-4c3e-8d5a-2f7a9e1b4d22")


def v0() -> None:
    """Two prompts of two rollouts, interleaved; one extra of the reward function, one request id each."""
    inputs = [QUESTIONS[i % 2] for i in range(4)]
    outputs = [COMPLETIONS[i // 2] for i in range(4)]
    extras = {
        "acc": [np.float64(1.0), np.float64(1.0), np.float64(1.0), np.float64(0.0)],
        "pred": ["42", "42", "42", None],
        "request_id": [f"request-{i}" for i in range(4)],
        "of another length": [1.0],
    }
    RayPPOTrainer._write_generations(
        inputs, outputs, ["42"] * 4, [1.0, 1.0, 1.0, 0.0], extras, FOLDER / "v0", 7
    )


def v1() -> None:
    """The same, named; session 1 of the second prompt has two outputs, of which the last counts."""
    places = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]
    writer = next(value for value in vars(trainer_base).values() if hasattr(value, "_write_generations"))
    writer._write_generations(
        [QUESTIONS[prompt] for prompt, _, _ in places],
        [COMPLETIONS[session] if output == 0 else "#42" for _, session, output in places],
        ["42"] * 5,
        [1.0, 1.0, 1.0, 0.0, 0.5],
        {"uid": [f"{UIDS[prompt]}_{session}_{output}" for prompt, session, output in places]},
        FOLDER / "v1",
        8,
    )


if __name__ == "__main__":
    v0()
    v1()
