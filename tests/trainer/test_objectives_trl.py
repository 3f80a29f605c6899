"""Loss and gradients are those of TRL's GRPOTrainer, run for real on the same random model and batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.logprobs import completion_logprobs
from pipeline.objective_config import ObjectiveConfig
from trainer.advantages import batch_advantages
from trainer.policy_loss import BatchCounts, PolicyTokens, policy_loss

NUM_PROMPTS, GROUP_SIZE, MAX_TOKENS = 3, 4, 12
PROMPTS = ["1+2=", "30-7*2=", "9="]
CLIPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}
TRL_EPSILON = 1e-4
TOLERANCE = 1e-5  # relative, in float32


def first_token_reward(completion_ids, **_):
    """Some groups are mixed; rewards are no round numbers, and two prompts' groups differ."""
    return [round(ids[0] % 7 / 3, 2) for ids in completion_ids]


@pytest.fixture(scope="module")
def trl_trainer(make, tmp_path_factory):
    """TRL's own trainer, as its users make it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=NUM_PROMPTS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_TOKENS,
        use_cpu=True,
        bf16=False,
        report_to=[],
        seed=1,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=make.model(),
        reward_funcs=first_token_reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make.tokenizer(),
    )
    trainer.model.train()
    return trainer


def drifted(logprobs, scale, seed):
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(seed))
    return (logprobs + scale * noise).clamp_max(-1e-3)


def trl_batch(trainer, objective, scaled, correction):
    """What TRL samples and scores, old log-probs of a drifted policy, an engine that errs a little."""
    trainer.loss_type = "grpo" if objective == "gspo" else objective
    trainer.importance_sampling_level = "sequence" if objective == "gspo" else "token"
    trainer.epsilon_low, trainer.epsilon_high = CLIPS[objective]
    trainer.scale_rewards = "group" if scaled else "none"
    trainer.use_vllm = False
    torch.manual_seed(39)
    examples = [{"prompt": prompt} for prompt in PROMPTS for _ in range(GROUP_SIZE)]
    batch = trainer._generate_and_score_completions(examples)
    mask = batch["completion_mask"]
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1),
            torch.cat((batch["prompt_mask"], mask), 1),
            mask.size(1),
        )
    # What turned out badly has become likelier: the loss is then no difference of nearly equal sums, which
    # float32 cannot tell to five digits.
    old = drifted(now - 1.0 * (batch["advantages"] < 0)[:, None], 0.3, seed=1)
    sampler = drifted(old, 0.3, seed=2)
    batch["old_per_token_logps"] = old
    if correction != "none":
        # `_generate_and_score_completions` computes it so, where vLLM samples
        trainer.use_vllm = True
        difference = (old - sampler) * mask
        if correction == "sequence_mask":
            difference = difference.sum(-1, keepdim=True)
        ratio = difference.exp()
        cap = correction_cap(correction)
        kept = ratio.clamp(max=cap) if correction == "truncated" else ratio.masked_fill(ratio > cap, 0.0)
        batch["importance_sampling_ratio"] = kept
        assert 0 < int((ratio > cap).sum()) < ratio.numel()
    return batch, sampler


def correction_cap(correction):
    return 1.5 if correction == "sequence_mask" else 1.2


def trl_loss_and_gradients(trainer, batch, accumulation):
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.args.steps_per_generation = accumulation
    trainer.model.zero_grad(set_to_none=True)
    rows = len(batch["prompt_ids"])
    total = 0.0
    for part in torch.arange(rows).chunk(accumulation):
        inputs = {
            key: value[part] if value.dim() and len(value) == rows else value
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
    return total, {name: param.grad.clone() for name, param in trainer.model.named_parameters()}


def our_loss_and_gradients(model, config, batch, sampler):
    """The same from ids and rewards: our advantages, forward pass, loss."""
    mask = batch["completion_mask"].bool()
    rows = [
        (prompt[kept.bool()].numpy(), completion[real].numpy())
        for prompt, kept, completion, real in zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], mask, strict=True
        )
    ]
    rewards = first_token_reward([completion.tolist() for _, completion in rows])
    lengths = mask.sum(1)
    advantages, kept = batch_advantages(
        config,
        torch.tensor(rewards, dtype=torch.float64),
        torch.arange(NUM_PROMPTS).repeat_interleave(GROUP_SIZE),
        lengths,
        max_tokens=MAX_TOKENS,
    )
    assert kept.all()
    stats = completion_logprobs(model, rows)
    tokens = PolicyTokens(
        stats.logprobs,
        batch["old_per_token_logps"][mask],
        stats.entropies,
        advantages,
        lengths,
        sampler_logprobs=sampler[mask],
    )
    loss, figures = policy_loss(config, tokens, BatchCounts(len(rows), int(lengths.sum()), MAX_TOKENS))
    loss.backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    return SimpleNamespace(loss=loss.item(), gradients=gradients, advantages=advantages, figures=figures)


def our_config(objective, scaled, correction):
    low, high = CLIPS[objective]
    options = {"clip_low": low, "clip_high": high, "scale_rewards": scaled}
    if scaled:
        options |= {"advantage_epsilon": TRL_EPSILON}
    if objective == "dapo":
        options |= {"overlong_penalty": 0.0, "dynamic_sampling": False}  # which TRL has not
    caps = {"correction_cap": correction_cap(correction)} if correction != "none" else {}
    return ObjectiveConfig(objective=objective, correction=correction, **{objective: options}, **caps)


CASES = [(objective, scaled) for objective in CLIPS for scaled in (True, False)]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("correction", ["none", "truncated", "sequence_mask", "token_mask"])
@pytest.mark.parametrize(("objective", "scaled"), CASES)
def test_loss_and_gradients_are_trls(make, trl_trainer, objective, scaled, correction, accumulation):
    batch, sampler = trl_batch(trl_trainer, objective, scaled, correction)
    loss, gradients = trl_loss_and_gradients(trl_trainer, batch, accumulation)
    ours = our_loss_and_gradients(make.model(), our_config(objective, scaled, correction), batch, sampler)
    torch.testing.assert_close(ours.advantages, batch["advantages"], rtol=TOLERANCE, atol=1e-6)
    assert ours.loss == pytest.approx(loss, rel=TOLERANCE)
    assert ours.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((ours.gradients[name] - gradient).norm()) < TOLERANCE * float(gradient.norm()), name


def test_the_compared_batch_has_unequal_lengths_clipped_tokens_and_a_mixed_group(make, trl_trainer):
    batch, sampler = trl_batch(trl_trainer, "grpo", True, "none")
    ours = our_loss_and_gradients(make.model(), our_config("grpo", True, "none"), batch, sampler)
    assert len(set(batch["completion_mask"].sum(1).tolist())) > 2
    assert len(set(batch["prompt_mask"].sum(1).tolist())) == NUM_PROMPTS
    assert 0.05 < ours.figures.clip_share < 0.8
    assert int((ours.advantages != 0).sum()) >= 2 * GROUP_SIZE
