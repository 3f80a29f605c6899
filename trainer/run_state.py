"""What a killed training goes on from, bit by bit: safetensors and JSON, written aside, the last k kept.

states/step-<optim_step>/tensors.safetensors   master weights and AdamW's moments
states/step-<optim_step>/state.json            everything else, and digests of both
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import ConfigError, said
from pipeline.hashing import content_id, file_sha256
from trainer.checkpoints import written_aside
from trainer.metrics import StepMetrics

log = logging.getLogger(__name__)

FORMAT = "1"  # of state.json; raise it where a state of before would be read wrongly
TENSORS, FACTS = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class RunState:
    """A training between two batches of rollouts.

    Attributes:
        policy_version: of the weights.
        steps: metrics of the optimizer steps so far; the next one's number is their count.
        parts: what each part of the loop keeps over steps, as JSON values.
        tensors: the optimizer's.
    """

    policy_version: int
    steps: list[StepMetrics]
    parts: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]


def save_state(folder: Path, identity: Mapping[str, str], state: RunState, num_kept: int) -> None:
    """Write `state` to `folder` (`states/`), then remove all but the last `num_kept` states.

    Args:
        identity: names of what the training is of, by what they name ("tokenizer"); see `newest_state`.

    Raises:
        ModelError: the disk is full or the folder cannot be written; states of before are still there.
    """
    with written_aside(folder / _name(len(state.steps))) as aside:
        save_file(state.tensors, aside / TENSORS)
        facts = {
            "identity": {"format": FORMAT, **identity},
            "policy_version": state.policy_version,
            "steps": [asdict(step) for step in state.steps],
            "parts": state.parts,
            "tensors_sha256": file_sha256(aside / TENSORS),
        }
        whole = {"facts": facts, "facts_id": content_id(facts)}
        (aside / FACTS).write_text(json.dumps(whole, allow_nan=False) + "\n", encoding="utf-8")
    # Later ones than the state that was gone on from are damaged.
    kept = [path for path in _newest_first(folder) if path.name <= _name(len(state.steps))][:num_kept]
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def newest_state(folder: Path, identity: Mapping[str, str]) -> RunState | None:
    """The newest whole state in `folder`; damaged ones are passed over, each with a line in the log.

    Raises:
        ConfigError: that state is of another training: another name stands in its identity.
    """
    for path in _newest_first(folder):
        try:
            facts = _whole_facts(path)
            _check_identity(path, facts["identity"], {"format": FORMAT, **identity})
            return RunState(
                facts["policy_version"],
                [StepMetrics(**step) for step in facts["steps"]],
                facts["parts"],
                load_file(path / TENSORS),
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("Passed over the damaged training state %s: %s.", path, said(error))
    return None


def _whole_facts(path: Path) -> dict[str, Any]:
    whole = json.loads((path / FACTS).read_text(encoding="utf-8"))
    facts: dict[str, Any] = whole["facts"]
    if content_id(facts) != whole["facts_id"]:
        raise ValueError(f"{FACTS} is not what was written")
    if file_sha256(path / TENSORS) != facts["tensors_sha256"]:
        raise ValueError(f"{TENSORS} is not what was written")
    return facts


def _check_identity(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    others = [name for name, value in expected.items() if found.get(name) != value]
    if others:
        raise ConfigError(
            f"{path} is the state of a training with another {' and '.join(others)}. "
            f"Train in another folder, or remove {path.parent} to begin again."
        )


def _newest_first(folder: Path) -> list[Path]:
    """The states by step; names have one length up to 10¹² steps, so that they sort."""
    return sorted((path for path in folder.glob("step-*") if not path.suffix), reverse=True)


def _name(num_steps: int) -> str:
    return f"step-{num_steps:012d}"
