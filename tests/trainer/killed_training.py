"""The real training loop in a process that kills itself (SIGKILL) at a chosen moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from loop_helpers import PROMPTS, SAMPLING, even_sum

from trainer import loop, run_state

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trainer.loop", "pipeline.models", "pipeline.engines.transformers"])

SECONDS = 240  # a training of the tiny model that takes longer hangs; half a minute of it is vLLM's start


class Kill(NamedTuple):
    """The `nth` time (from 1) that a process does something.

    `rollouts`: sampled a batch, and handed it out; `uses`: handed out the uses of clips; `step`: wrote a
    line of metrics; `state`: half a state is written; `checkpoint`: half the checkpoint is.
    """

    moment: str
    nth: int


class Story(NamedTuple):
    """What a training left behind, times apart."""

    metrics: list
    weights: bytes
    uses: set
    rollouts: set


def run(folder: Path, model_folder: Path, clips, config, kill: Kill | None = None) -> int:
    """Trains in a child process, sampling with `config.engine`; its exit code, negative if it was killed."""
    folder.mkdir(exist_ok=True)
    process = _context.Process(target=_train, args=(folder, model_folder, clips, config, kill))
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None
    return process.exitcode


def story(folder: Path) -> Story:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["tokens_per_second"]
    return Story(
        lines,
        (folder / "checkpoint" / "model.safetensors").read_bytes(),
        _lines(folder / "uses"),
        _lines(folder / "rollouts"),
    )


def _lines(path: Path) -> set[str]:
    return set(path.read_text().splitlines()) if path.exists() else set()


def _train(folder: Path, model_folder: Path, clips, config, kill: Kill | None) -> None:
    from pipeline.models import load_model
    from pipeline.tokenization import load_tokenizer

    counts: Counter[str] = Counter()

    def reached(moment: str) -> None:
        counts[moment] += 1
        if (moment, counts[moment]) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def told(name: str, facts: list[object]) -> None:
        with (folder / name).open("a") as file:
            file.writelines(json.dumps(fact) + "\n" for fact in facts)
        reached(name)

    def rollouts(groups, judgements, version) -> None:
        samples = [(group, sample) for group in groups for sample in group.samples]
        told(
            "rollouts",
            [[version, g.prompt.prompt_id, s.seed, s.completion_ids.tolist(),
              np.asarray(s.logprobs).tolist()] for g, s in samples],
        )  # fmt: skip

    def at(moment: str, module, name: str) -> None:
        real = getattr(module, name)

        def wrapped(*args, **kwargs):
            result = real(*args, **kwargs)
            reached(moment)
            return result

        setattr(module, name, wrapped)

    model, tokenizer = load_model(model_folder, "cpu"), load_tokenizer(model_folder)
    at("state", run_state, "file_sha256")
    at("checkpoint", model, "save_pretrained")
    with closing(_engine(config, model, tokenizer, model_folder, folder)) as engine:
        loop.train(
            model,
            tokenizer,
            engine,
            PROMPTS,
            clips,
            config,
            SAMPLING,
            even_sum,
            rollouts,
            lambda uses: told("uses", uses),
            folder,
            "training",
            10,
            progress=lambda _: reached("step"),
        )


def _engine(config, model, tokenizer, model_folder: Path, folder: Path):
    from pipeline.config import EngineConfig
    from trainer.night import _engine as engine_of

    # In this process, where requests come together as they did before; see docs/training.md.
    vllm = {"max_num_seqs": 16, "kv_cache_gib": 0.05, "enforce_eager": True, "in_process": True}
    options = EngineConfig.model_validate({"dtype": "float32", "vllm": vllm})
    return engine_of(config, options, model, tokenizer, model_folder, folder)
