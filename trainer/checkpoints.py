"""Checkpoints: a Hugging Face model folder that says which policy version it holds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    policy_version: int,
    model_name: str,
    training_id: str,
) -> Path:
    """Write `folder` aside and rename it into place: it is there in whole or not at all.

    Raises:
        ModelError: the disk is full or the folder cannot be written; what was there before still is.
    """
    origin = {"policy_version": policy_version, "model": model_name, "training_id": training_id}
    with written_aside(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "echomine.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return folder


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """An empty folder to write in, which then takes the place of `folder`, synced.

    Raises:
        ModelError: the disk is full or the folder cannot be written; what was there before still is.
    """
    aside, replaced = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".replaced")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        aside.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"Cannot write the checkpoint {folder}: {error}. "
            f"Free space or permit writing there, and train again."
        ) from None
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """A rename must not reach the disk before what it names does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
