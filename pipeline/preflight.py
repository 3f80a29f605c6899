"""What a night needs is looked at before anything starts: a mistake shows in seconds, and costs nothing."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.batch_room import check_rollout_room
from pipeline.config import NightlyConfig
from pipeline.engines.choice import check_engine
from pipeline.errors import ModelError, said
from pipeline.experts import TAUGHT_BY_EXPERTS, experts_of
from pipeline.lake import Lake
from pipeline.models import check_fit, model_folder, recorded_version
from pipeline.prompts import read_prompts
from pipeline.rewards import VerifierPool
from pipeline.tokenization import load_tokenizer
from pipeline.verifiers import BUILT_IN, check_name


def check_night(config: NightlyConfig, lake: Path | None = None) -> None:
    """Raises an EchoMineError if the prompts, engine, model, its tokenizer or the verifier cannot be used.

    Args:
        lake: where the training that follows finds experts, if its objective learns from them; None where no
            training follows. Its prompts must then leave room for their completions, too.
    """
    check_name(config.verify.verifier)
    prompts = read_prompts(config.prompts, config.max_prompts)
    check_engine(config.engine)
    folder = model_folder(config.model)
    tokenizer = load_tokenizer(folder)
    check_fit(folder, tokenizer)
    check_weights(folder)
    recorded_version(folder)
    if lake is not None:
        taught = config.train.objective in TAUGHT_BY_EXPERTS
        experts = (
            experts_of(Lake.open(lake), prompts, folder, config.train, config.sampling) if taught else {}
        )
        check_rollout_room(prompts, experts, config.train, config.sampling, tokenizer)
    if config.verify.verifier not in BUILT_IN:
        # a process of its own imports it, as it will tonight
        with VerifierPool(config.verify):
            pass


def check_weights(folder: Path) -> None:
    """Raises ModelError if a weights file is cut off or no safetensors; reads headers only."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is no whole safetensors file: {said(error)}. Copy it there anew."
            ) from error
