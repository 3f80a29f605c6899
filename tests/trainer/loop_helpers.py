"""Trainings of the tiny model through the real loop, with everything they hand out."""

from __future__ import annotations

import json

import torch

from pipeline.config import SamplingConfig, TrainConfig
from pipeline.records import Judgement, Prompt
from trainer.loop import train

PROMPTS = [Prompt(({"role": "user", "content": f"{i}+{i}="},), str(2 * i)) for i in range(5)]
SAMPLING = SamplingConfig(max_tokens=6)
CONFIG = TrainConfig(
    optim_steps=3, prompts_per_step=2, group_size=3, clips_per_step=4, lr=1e-3, batch_tokens=40, seed=5
)


def even_sum(groups):
    """A verifier that mixed groups come of: completions of an even id sum succeed."""
    return [[Judgement(float(s.completion_ids.sum() % 2 == 0)) for s in g.samples] for g in groups]


class Training:
    """One training with everything it handed out."""

    def __init__(
        self,
        make,
        folder,
        *,
        prompts=PROMPTS,
        clips=(),
        config=CONFIG,
        judge=even_sum,
        sampling=SAMPLING,
        wrap=lambda engine: engine,
        experts=None,
        model=None,
    ):
        self.model, self.tokenizer = model or make.model(), make.tokenizer()
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.rollouts, self.clip_uses, self.seen = [], [], []
        self.result = train(
            self.model,
            self.tokenizer,
            wrap(make.engine(self.model, self.tokenizer)),
            prompts,
            clips,
            config,
            sampling,
            judge,
            lambda groups, judgements, version: self.rollouts.append((groups, judgements, version)),
            self.clip_uses.append,
            folder,
            "training",
            10,
            progress=self.seen.append,
            experts=experts,
        )
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        self.metrics = [json.loads(line) for line in text.splitlines()]

    def changed(self):
        now = self.model.state_dict()
        return any(not torch.equal(now[name], value) for name, value in self.before.items())
