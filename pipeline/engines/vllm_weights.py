"""Whether a checkpoint has all the weights of another, from the headers of its files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from pipeline.errors import EngineError, said

HEAD = "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"  # older checkpoints carry it; nobody reads it


def check_complete(folder: Path, in_use: Path) -> None:
    """Sees to it that a folder has every tensor of the one in use: vLLM keeps what it does not find there.

    Raises:
        EngineError: some are missing, or a file is damaged.
    """
    missing = _tensors(in_use) - _tensors(folder)
    if AutoConfig.from_pretrained(str(in_use), local_files_only=True).tie_word_embeddings:
        missing.discard(HEAD)  # a tied head is saved or not
    if missing:
        raise EngineError(
            f"The weights in {folder} lack {len(missing)} tensors of those in use ({in_use}), such as "
            f"{min(missing)}. Give a checkpoint of the same model, with all its files."
        )


def _tensors(folder: Path) -> set[str]:
    names = set[str]()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise EngineError(
                f"{path} is no whole safetensors file: {said(error)}. Give a checkpoint of the same model."
            ) from error
    return {name for name in names if not name.endswith(_COMPUTED)}
