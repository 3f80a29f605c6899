"""Any configured objective's loss on a micro-batch of rollouts, from one call.

| objective | ratio of      | surrogate           | mean                     | more                        |
|-----------|---------------|---------------------|--------------------------|-----------------------------|
| grpo      | tokens        | clipped             | of sequences' means      |                             |
| dapo      | tokens        | clipped higher      | of the batch's tokens    | shaping, dropped groups (1) |
| dr_grpo   | tokens        | clipped             | Σ / (R · L_max)          |                             |
| gspo      | whole rollout | clipped             | of sequences' means      |                             |
| luffy     | tokens        | no clip; expert f(π)| Σ / (R · L_max)          | entropy bonus               |
| uft       | tokens        | clipped             | of sequences' means      | entropy bonus, NLL of hints |

(1) in `trainer/advantages.py`. UFT's KL term to a reference model (weight 0.001 there) is left out: this
trainer holds no reference model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.objective_config import DrGrpoConfig, LuffyConfig, ObjectiveConfig, UftConfig
from trainer import objectives
from trainer.corrections import correction_weights, mismatch_kl


@dataclass(frozen=True)
class PolicyTokens:
    """The completions of R rows, N tokens, one row after the other; log-probs in nats.

    Attributes:
        logprobs: [N] under the policy at the sampling temperature, differentiable.
        old_logprobs: [N] by the trainer, under the weights that sampled; `logprobs` detached in the first
            update on fresh rollouts.
        entropies: [N], differentiable where `needs_entropy_gradient`.
        advantages: [R].
        lengths: [R] int64.
        sampler_logprobs: [N] by the engine; None where it does not say.
        is_expert: [R] bool, LUFFY's expert rows; what their old and sampler log-probs are does not matter.
        hint_lengths: [R] int64, how many of each row's first tokens are UFT's hint, part of `lengths`.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    entropies: Tensor
    advantages: Tensor
    lengths: Tensor
    sampler_logprobs: Tensor | None = None
    is_expert: Tensor | None = None
    hint_lengths: Tensor | None = None


@dataclass(frozen=True)
class BatchCounts:
    """Of the whole batch, over all micro-batches and ranks.

    Attributes:
        num_rollouts: rows.
        num_tokens: completion tokens, without hints.
        max_tokens: what a completion may have at most, as sampled.
        num_hint_tokens: tokens of UFT's hints.
    """

    num_rollouts: int
    num_tokens: int
    max_tokens: int
    num_hint_tokens: int = 0


@dataclass(frozen=True)
class LossFigures:
    """Sums over the policy's own tokens, on the loss's device; those of micro-batches add up.

    Attributes:
        num_tokens: [] without experts' and hints'.
        num_clipped: [] tokens whose gradient the clip takes.
        ratio_sum: [] of π / π_old.
        entropy_sum: [] nats.
        kl_sum: [] nats, of the estimated KL(engine ‖ policy as it is now), which on fresh rollouts is the
            mismatch of engine and trainer; None where the engine does not say.
    """

    num_tokens: Tensor
    num_clipped: Tensor
    ratio_sum: Tensor
    entropy_sum: Tensor
    kl_sum: Tensor | None

    def __add__(self, other: LossFigures) -> LossFigures:
        known = self.kl_sum is not None and other.kl_sum is not None
        return LossFigures(
            self.num_tokens + other.num_tokens,
            self.num_clipped + other.num_clipped,
            self.ratio_sum + other.ratio_sum,
            self.entropy_sum + other.entropy_sum,
            self.kl_sum + other.kl_sum if known else None,  # type: ignore[operator]
        )

    def as_dict(self) -> dict[str, float | None]:
        """As JSON values, which `of` reads."""
        return {name: None if value is None else value.item() for name, value in vars(self).items()}

    @classmethod
    def of(cls, values: Mapping[str, float | None], device: torch.device) -> LossFigures:
        sums = {
            name: None if value is None else torch.tensor(value, device=device)
            for name, value in values.items()
        }
        return cls(**sums)  # type: ignore[arg-type]

    @property
    def clip_share(self) -> float | None:
        return self._mean(self.num_clipped)

    @property
    def ratio_mean(self) -> float | None:
        return self._mean(self.ratio_sum)

    @property
    def entropy_mean(self) -> float | None:
        """Nats per token, at temperature 1."""
        return self._mean(self.entropy_sum)

    @property
    def mismatch_kl(self) -> float | None:
        """Nats per token."""
        return self._mean(self.kl_sum)

    def _mean(self, total: Tensor | None) -> float | None:
        return None if total is None or not self.num_tokens else float(total / self.num_tokens)


def needs_entropy_gradient(config: ObjectiveConfig) -> bool:
    """Whether the objective has an entropy bonus, so that entropies must be differentiable."""
    options = config.options
    return isinstance(options, LuffyConfig | UftConfig) and options.entropy_weight > 0


def policy_loss(
    config: ObjectiveConfig, tokens: PolicyTokens, counts: BatchCounts
) -> tuple[Tensor, LossFigures]:
    """The micro-batch's share of the batch's loss: those of all its micro-batches add up to it.

    Returns:
        [] differentiable loss, and detached figures.

    Raises:
        ConfigError: a correction is configured, and the engine's log-probs are not known.
        ValueError: expert rows under another objective than LUFFY, or hints under another than UFT.
    """
    options = config.options
    hint_loss = tokens.logprobs.new_zeros(())
    if tokens.hint_lengths is not None:
        if not isinstance(options, UftConfig):
            raise ValueError(f"hints are UFT's, and the objective is {config.objective}")
        tokens, hint_logprobs = _without_hints(tokens, tokens.hint_lengths)
        # UFT, arXiv 2505.16984; `verl/workers/actor/dp_actor.py` of its repository
        hint_loss = -options.sft_weight * objectives.token_mean(hint_logprobs, counts.num_hint_tokens)
    tokens, is_expert = _experts_as_sampled(tokens)
    if is_expert.any() and not isinstance(options, LuffyConfig):
        raise ValueError(f"expert rows are LUFFY's, and the objective is {config.objective}")
    ratios = _ratios(config, tokens)
    advantages = tokens.advantages.to(ratios.dtype).repeat_interleave(tokens.lengths)
    clip = options.clip_low, options.clip_high
    losses = objectives.surrogate_losses(ratios, advantages, *clip)
    if isinstance(options, LuffyConfig):
        expert_losses = objectives.expert_losses(tokens.logprobs, advantages, options.shaping_gamma)
        losses = torch.where(is_expert, expert_losses, losses)
    loss = _batch_mean(config, losses * _weights(config, tokens), tokens.lengths, counts) + hint_loss
    if isinstance(options, LuffyConfig | UftConfig) and options.entropy_weight:
        loss = loss - options.entropy_weight * objectives.token_mean(tokens.entropies, counts.num_tokens)
    is_clipped = objectives.clipped(ratios.detach(), advantages, *clip)
    return loss, _figures(tokens, ratios.detach(), is_clipped, ~is_expert)


def _ratios(config: ObjectiveConfig, tokens: PolicyTokens) -> Tensor:
    if config.objective == "gspo":
        return objectives.sequence_ratios(tokens.logprobs, tokens.old_logprobs, tokens.lengths)
    return objectives.token_ratios(tokens.logprobs, tokens.old_logprobs)


def _weights(config: ObjectiveConfig, tokens: PolicyTokens) -> Tensor:
    if config.correction == "none":
        return torch.ones_like(tokens.old_logprobs)
    if tokens.sampler_logprobs is None:
        raise ConfigError(
            f"train.correction is {config.correction}, but the engine's log-probs of these rollouts are not "
            f"known. Sample with top_p 1 and top_k 0, or set train.correction to none."
        )
    return correction_weights(config, tokens.old_logprobs, tokens.sampler_logprobs, tokens.lengths)


def _batch_mean(config: ObjectiveConfig, losses: Tensor, lengths: Tensor, counts: BatchCounts) -> Tensor:
    options = config.options
    if isinstance(options, DrGrpoConfig | LuffyConfig):
        norm_tokens = options.norm_tokens or counts.max_tokens
        return objectives.fixed_length_mean(losses, counts.num_rollouts, norm_tokens)
    if config.objective == "dapo":
        return objectives.token_mean(losses, counts.num_tokens)
    return objectives.sequence_mean(losses, lengths, counts.num_rollouts)


def _experts_as_sampled(tokens: PolicyTokens) -> tuple[PolicyTokens, Tensor]:
    """The same with ratio 1 for expert tokens, which nobody sampled; and which those are, [N] bool.

    Whatever a caller filled in there must not reach the gradient: 0 × inf is no number.
    """
    logprobs = tokens.logprobs.detach()
    is_expert = torch.zeros(len(logprobs), dtype=torch.bool, device=logprobs.device)
    if tokens.is_expert is not None:
        is_expert = tokens.is_expert.repeat_interleave(tokens.lengths)
    old = torch.where(is_expert, logprobs, tokens.old_logprobs.to(logprobs.dtype))
    sampler = tokens.sampler_logprobs
    if sampler is not None:
        sampler = torch.where(is_expert, old, sampler.to(logprobs.dtype))
    return replace(tokens, old_logprobs=old, sampler_logprobs=sampler), is_expert


def _without_hints(tokens: PolicyTokens, hint_lengths: Tensor) -> tuple[PolicyTokens, Tensor]:
    """The completions alone, and [M] log-probs of the hints' tokens."""
    lengths = tokens.lengths
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    position = torch.arange(len(tokens.logprobs), device=lengths.device) - starts
    rest = position >= hint_lengths.repeat_interleave(lengths)
    sampler = tokens.sampler_logprobs
    completions = replace(
        tokens,
        logprobs=tokens.logprobs[rest],
        old_logprobs=tokens.old_logprobs[rest],
        entropies=tokens.entropies[rest],
        lengths=lengths - hint_lengths,
        sampler_logprobs=None if sampler is None else sampler[rest],
        hint_lengths=None,
    )
    return completions, tokens.logprobs[~rest]


@torch.no_grad()
def _figures(tokens: PolicyTokens, ratios: Tensor, is_clipped: Tensor, own: Tensor) -> LossFigures:
    kl = None
    if tokens.sampler_logprobs is not None:
        kl = mismatch_kl(tokens.logprobs.detach(), tokens.sampler_logprobs)[own].sum()
    entropy = tokens.entropies.detach()[own].sum()
    return LossFigures(own.sum(), (is_clipped & own).sum(), ratios[own].sum(), entropy, kl)
