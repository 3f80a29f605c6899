"""Exports opened by the libraries they are for."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from sample_lake import SampleLake, character_tokenizer
from trl import SFTConfig, SFTTrainer

from pipeline.config import ExportConfig
from pipeline.exports.core import export_clips
from pipeline.exports.hf import HF, hf
from pipeline.exports.luffy import LUFFY, luffy
from pipeline.exports.sft import SFT, sft
from pipeline.exports.trl import trl
from pipeline.models import load_model, model_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_load_dataset_opens_an_hf_folder(sample_lake: SampleLake, tmp_path: Path) -> None:
    form = hf(character_tokenizer())
    done = export_clips(sample_lake.lake, tmp_path / "hf", form, ExportConfig(clips_per_shard=2))
    opened = datasets.load_dataset(str(done.folder))
    assert list(opened) == ["train"]
    assert opened["train"].column_names == HF.names
    assert opened["train"].num_rows == done.clips > 2


def test_load_dataset_opens_the_files_of_luffy_and_sft(sample_lake: SampleLake, tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    for kind, form, schema in (("parquet", luffy(tokenizer), LUFFY), ("json", sft(tokenizer), SFT)):
        done = export_clips(sample_lake.lake, tmp_path / "out", form, ExportConfig())
        files = [str(done.folder / file["file"]) for file in done.manifest["files"]]
        opened = datasets.load_dataset(kind, data_files=files)["train"]
        assert opened.column_names == schema.names
        assert opened.num_rows == done.clips > 0


def test_trl_trains_on_the_sampled_tokens_of_the_clips_alone(sample_lake: SampleLake, tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Trainer(SFTTrainer):
        def compute_loss(self, model, inputs, **rest):
            seen.extend(row[row != -100].tolist() for row in inputs["labels"])
            return super().compute_loss(model, inputs, **rest)

    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    done = export_clips(sample_lake.lake, tmp_path / "trl", trl(tokenizer), ExportConfig())
    files = [str(done.folder / file["file"]) for file in done.manifest["files"]]
    rows = datasets.load_dataset("parquet", data_files=files)["train"]
    model = load_model(model_folder("arith"), "cpu")
    model.resize_token_embeddings(len(tokenizer))
    config = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=rows.num_rows,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
    )
    Trainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer).train()
    wanted = [
        [token for token, learned in zip(row["input_ids"], row["completion_mask"], strict=True) if learned]
        for row in rows
    ]
    assert sorted(seen) == sorted(wanted)
