from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ModelError
from trainer.checkpoints import save_checkpoint

ORIGIN = {"policy_version": 7, "model_name": "tiny", "training_id": "t"}
WRITTEN = {"policy_version": 7, "model": "tiny", "training_id": "t"}


def test_a_checkpoint_is_a_model_folder_that_knows_its_policy_version(model, tokenizer, tmp_path):
    folder = save_checkpoint(model, tokenizer, tmp_path / "checkpoint", **ORIGIN)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder)("1+2=")["input_ids"] == tokenizer("1+2=")["input_ids"]
    assert json.loads((folder / "echomine.json").read_text()) == WRITTEN
    assert (folder / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_new_checkpoint_replaces_the_old_one_and_a_left_over_half(model, tokenizer, tmp_path):
    folder = save_checkpoint(model, tokenizer, tmp_path / "checkpoint", **ORIGIN)
    (folder / "old").touch()
    (tmp_path / "checkpoint.partial").mkdir()
    (tmp_path / "checkpoint.partial" / "half").touch()
    save_checkpoint(model, tokenizer, folder, **{**ORIGIN, "policy_version": 8})
    assert json.loads((folder / "echomine.json").read_text())["policy_version"] == 8
    assert not (folder / "old").exists()
    assert not (folder / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_that_cannot_be_written_is_one_line_and_the_old_checkpoint_stays(
    model, tokenizer, tmp_path, monkeypatch
):
    folder = save_checkpoint(model, tokenizer, tmp_path / "checkpoint", **ORIGIN)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(ModelError, match=r"No space left on device.*Free space") as caught:
        save_checkpoint(model, tokenizer, folder, **{**ORIGIN, "policy_version": 8})
    assert "\n" not in str(caught.value)
    assert json.loads((folder / "echomine.json").read_text()) == WRITTEN
