"""Writes the dumps whose writers do not run here, field by field as their sources have them.

Run from this folder, in the project's environment. Where a writer pickles its own classes (Trinity-RFT),
stand-ins of the same names and attributes are pickled.
"""

from __future__ import annotations

import json
import pickle
import sqlite3
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

PROMPT, ANSWER, WRONG = [1, 2, 3, 4, 5], [52, 128], [53, 128]


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class EID:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Experience(EID):
    pass


def experience(run: int, completion: list[int], reward: float | None, **changes: Any) -> Experience:
    attributes: dict[str, Any] = {
        "eid": stand_in(EID, batch=3, task=1, run=run, step=0, suffix=f"abc{run}"),
        "tokens": torch.tensor(PROMPT + completion, dtype=torch.int32),
        "prompt_length": len(PROMPT),
        "logprobs": torch.full((len(completion),), -0.125),
        "reward": reward,
        "action_mask": torch.ones(len(completion), dtype=torch.bool),
        "advantages": None,
        "info": {"model_version": 2, "use_count": 0},
        "metrics": {"accuracy": np.float64(1.0)},
        "prompt_text": "2+2?",
        "response_text": "4",
        "messages": None,
        "chosen": None,
        "rejected": None,
    }
    return stand_in(Experience, **(attributes | changes))


def stand_in(kind: type, **attributes: Any) -> Any:
    """Pickled under Trinity's name for it."""
    kind.__module__ = "trinity.common.experience"
    return kind(**attributes)


def trinity() -> None:
    module = types.ModuleType("trinity.common.experience")
    module.EID, module.Experience = EID, Experience
    sys.modules[module.__name__] = module
    mask = torch.tensor([True, False, True])
    step = stand_in(EID, batch=3, task=1, run=0, step=2, suffix="later")
    rows = [
        experience(0, ANSWER, 1.0),
        experience(0, WRONG, 0.0),  # `run` is left at 0 by many workflows
        experience(1, [60, 70, 128], 1.0, action_mask=mask),
        experience(1, ANSWER, 1.0, eid=step),
        experience(1, ANSWER, 1.0, truncate_status="response_truncated"),
        experience(1, ANSWER, 1.0, chosen=torch.tensor([1]), rejected=torch.tensor([2])),
    ]
    folder = Path("trinity")
    folder.mkdir(exist_ok=True)
    for name, schema, fill in (
        ("old.db", OLD_TRINITY, lambda one: (one.prompt_text, one.response_text, one.reward, 7, blob(one))),
        ("new.db", NEW_TRINITY, lambda one: ("8", one.eid.run, one.eid.suffix, 2, blob(one), one.reward)),
    ):
        (folder / name).unlink(missing_ok=True)
        with sqlite3.connect(folder / name) as connection:
            connection.execute(schema[0])
            connection.executemany(schema[1], [fill(one) for one in rows])
    (folder / "split.db").unlink(missing_ok=True)
    with sqlite3.connect(folder / "split.db") as connection:
        connection.execute("create table buffer (id integer primary key, task_id text, reward real)")
        connection.execute("create table buffer_blob (id integer primary key, experience_bytes blob)")
        connection.execute("insert into buffer values (1, '8', 0.5), (2, '8', 0.5)")
        connection.execute("insert into buffer_blob values (1, ?)", (blob(rows[0]),))


def blob(one: Experience) -> bytes:
    return pickle.dumps(one)


OLD_TRINITY = (
    "create table experience (id integer primary key, prompt text, response text, message_list json, "
    "reward float, model_version integer, experience_bytes blob, consumed integer)",
    "insert into experience (prompt, response, reward, model_version, experience_bytes) "
    "values (?, ?, ?, ?, ?)",
)
NEW_TRINITY = (
    "create table gsm8k_buffer (id integer primary key, timestamp datetime, task_id varchar(64), "
    "run_id integer, msg_id varchar(64), model_version integer, experience_bytes blob, reward float, "
    "consumed integer)",
    "insert into gsm8k_buffer (task_id, run_id, msg_id, model_version, experience_bytes, reward) "
    "values (?, ?, ?, ?, ?, ?)",
)


def nemo_rl() -> None:
    def row(index: int, completion: list[int], reward: float, **changes: Any) -> dict[str, Any]:
        ids, width = PROMPT + completion, 9
        padded = ids + [0] * (width - len(ids))
        flags = [0] * len(PROMPT) + [1] * len(completion) + [0] * (width - len(ids))
        return {
            "content": [["2+2?", "4"]],
            "rewards": [reward],
            "input_lengths": [len(ids)],
            "token_ids": [padded],
            "token_loss_mask": [flags],
            "sample_loss_mask": [1.0],
            "advantages": [[0.0] * width],
            "generation_logprobs": [[-0.125 * flag for flag in flags]],
            "prev_logprobs": [[-0.5 * flag for flag in flags]],
            "idx": index,
        } | changes

    turns = row(2, [60, 70, 128], 1.0, token_loss_mask=[[0, 0, 0, 0, 0, 1, 0, 1, 0]])
    overlong = row(3, [52, 52, 52, 52], 0.0, sample_loss_mask=[0.0])
    other = row(4, ANSWER, 1.0, token_ids=[[9, 2, 3, 4, 5, *ANSWER, 0, 0]])
    rows = [row(0, ANSWER, 1.0), row(1, WRONG, 0.0), turns, overlong, other]
    write_lines(Path("nemo_rl/train_data_step12.jsonl"), rows)
    filtered = row(0, ANSWER, 0.0, filtered_rewards=[1.0])
    write_lines(Path("nemo_rl/train_data_step13.jsonl"), [filtered])
    old = {name: value for name, value in row(0, ANSWER, 1.0).items() if not name.startswith("token")}
    write_lines(Path("nemo_rl/without_tokens.jsonl"), [old])


def areal() -> None:
    row = {
        "task_id": 11,
        "sample_idx": 0,
        "seqlen": 7,
        "prompt_len": 5,
        "head_version": 4,
        "tail_version": 5,
        "version_rle": [[4, 1], [5, 1]],
        "reward": 2.5,
        "prompt": "<|im_start|>user\n2+2?",
        "completion": "4<|im_end|>",
        "original_reward": 1.0,
    }
    old = {name: value for name, value in row.items() if name not in ("version_rle", "original_reward")}
    rows = [
        row,
        row | {"sample_idx": 1, "completion": "5<|im_end|>", "reward": -2.5, "original_reward": 0.0},
        row | {"sample_idx": 2, "segments": [{"role": "model", "text": "4"}]},
        old | {"sample_idx": 3, "reward": 1.0, "head_version": -1, "tail_version": -1},
    ]
    write_lines(Path("areal/5/11.jsonl"), rows)


def slime() -> None:
    def sample(index: int, completion: list[int], reward: Any, **changes: Any) -> dict[str, Any]:
        return {
            "group_index": 21,
            "index": 168 + index,
            "prompt": [{"role": "user", "content": "2+2?"}],
            "tokens": PROMPT + completion,
            "response": "4",
            "response_length": len(completion),
            "label": "4",
            "reward": reward,
            "loss_mask": None,
            "weight_versions": ["3"],
            "rollout_log_probs": [-0.125] * len(completion),
            "status": "completed",
            "metadata": {},
        } | changes

    samples = [
        sample(0, ANSWER, 1.0),
        sample(1, [52, 52, 52], 0.0, status="truncated", weight_versions=["4", "3"]),
        sample(2, [60, 70, 128], 1.0, loss_mask=[1, 0, 1]),
        sample(3, ANSWER, {"score": 1.0, "format": 0.5}),
        sample(4, [], 0.0, status="aborted"),
        sample(5, [52, 128, 70], 1.0, loss_mask=[1, 1, 0], tokens=torch.tensor([*PROMPT, 52, 128, 70])),
        sample(6, ANSWER, {"a": 1.0, "b": 0.0}),
    ]
    Path("slime").mkdir(exist_ok=True)
    torch.save({"rollout_id": 5, "samples": samples}, "slime/rollout_5.pt")


def echorl() -> None:
    pad, width = 127, 4
    folder = Path("echorl/step_6")

    def sample(
        number: int, category: str, completion: list[int], reward: Any, left: int = 2
    ) -> dict[str, Any]:
        name = f"{category}_tensors/sample_{number}_entropy.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        entropies = np.array([0.5 + place / 4 for place in range(len(completion))], dtype=np.float32)
        np.save(folder / name, entropies)
        response = completion + [pad] * (width - len(completion))
        golden = category == "golden_trajectories"
        return {
            "sample_id": number,
            "step": 6,
            "prompt": "decoded, with what follows it",
            "response": "4",
            "prompt_ids": [pad] * left + PROMPT + ([] if golden else response),
            "response_ids": response,
            "reward": reward,
            "entropy_tensor_file": name,
        }

    dump = {
        "step": 6,
        "correct_rollouts": [sample(0, "correct_rollouts", ANSWER, 1.0)],
        "wrong_rollouts": [
            sample(1, "wrong_rollouts", WRONG, 0.0),
            sample(2, "wrong_rollouts", [52, 52, 52, 52], 0.0),
        ],
        "golden_trajectories": [sample(3, "golden_trajectories", [52, 10, 128], None)],
        "stats": {},
    }
    (folder / "samples.json").write_text(json.dumps(dump, indent=2))


def prompt_files() -> None:
    prompt = [{"role": "user", "content": "2+2?"}]
    verl = {
        "data_source": "sums",
        "prompt": prompt,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 0},
    }
    target = [{"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n4"}]
    rows = [
        verl | {"target": target, "target_ds_qwen_7b_probs": [0.5, 0.25, 1.0]},
        verl | {"target": None, "target_ds_qwen_7b_probs": None},
        verl | {"target": [], "target_ds_qwen_7b_probs": None},
    ]
    Path("experts").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), "experts/luffy.parquet")
    rows = [verl | {"hint": ["Two and two", "\nis 4."]}, verl | {"hint": []}]
    pq.write_table(pa.Table.from_pylist(rows), "experts/uft.parquet")


def prime_rl_annotations() -> None:
    """Beside the stream that make_verifiers.py writes: 5 prompt tokens, then the sampled ones."""
    rows = [
        {"trace_id": "solved", "info": {}, "branches": [{"index": 0, "entropies": [9.0] * 7}]},
        {"trace_id": "solved", "info": {}, "branches": [{"index": 0, "entropies": [None] * 5 + [0.5, 0.25]}]},
        {"trace_id": "solved", "info": {"step": 4}, "branches": []},
        {"trace_id": "cut-off", "branches": [{"index": 0, "entropies": [None] * 5 + [0.5, None, 0.25]}]},
    ]
    write_lines(Path("prime_rl/monitors/file/traces/annotations/trainer/00000.jsonl"), rows)
    export = {"schema_version": 1, "step": 4, "rank": 0, "micro_step": 0, "token_ids": [1], "entropy": [0.5]}
    write_lines(Path("prime_rl/token_exports/step_4/rank_0.jsonl"), [export])


if __name__ == "__main__":
    for write in (trinity, nemo_rl, areal, slime, echorl, prompt_files, prime_rl_annotations):
        write()
