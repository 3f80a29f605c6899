"""Writes the TRL fixtures with TRL's own trainer: `pip install trl==1.16.0 datasets`.

    python make_trl.py

Two steps of GRPO on the embedded model, on the CPU, with two reward functions of which one judges half of the
prompts (None elsewhere) and logs a column of its own; once with prompts as text, once as messages.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

FOLDER = Path(__file__).parent / "trl"
MODEL = Path(__file__).parents[4] / "data" / "arith" / "model"


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def correct(completions: list[Any], answer: list[str], log_extra: Any, **_: Any) -> list[float]:
    log_extra("answer", answer)
    return [float(text_of(c).endswith(f"#{a}")) for c, a in zip(completions, answer, strict=True)]


def steps(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
    """Judges the prompts whose answer is 42."""
    judged = zip(completions, answer, strict=True)
    return [0.25 if a == "42" and "\n" in text_of(c) else 0.0 if a == "42" else None for c, a in judged]


def write(name: str, prompts: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=40,
            log_completions=True,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=3,
            save_strategy="no",
        )
        data = Dataset.from_dict({"prompt": prompts, "answer": ["42", "42", "30", "30"]})
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        GRPOTrainer(str(MODEL), [correct, steps], config, data, processing_class=tokenizer).train()
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((Path(folder) / "completions").glob("*.parquet")):
            shutil.copy(path, FOLDER / name / path.name)


if __name__ == "__main__":
    questions = ["17+25", "18+24", "14+16", "11+19"]
    write("text", questions)
    write("messages", [[{"role": "user", "content": question}] for question in questions])
