"""Log-probabilities and entropies of tokens under a causal language model, without a [N, V] tensor.

The trainer's losses and the scorer both read a model through here: hidden states go through the output
embedding a few rows at a time, and backward computes those logits again instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import FormatError, ModelError
from pipeline.records import Int32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row: TypeAlias = tuple[Int32, Int32]  # prompt ids [P], completion ids [T]

CHUNK_ROWS = 512  # 512 rows of a 150,000-token vocabulary are 300 MB of float32 logits
HEAD_TOLERANCE = 1e-2  # nats per logit; bfloat16 heads round their logits to about this


@dataclass(frozen=True)
class TokenStats:
    """The completions of R rows, one after the other: N = sum of their lengths.

    Attributes:
        logprobs: [N] nats, differentiable.
        entropies: [N] nats, at temperature 1, detached.
        lengths: [R] int64, completion tokens of each row.
    """

    logprobs: Tensor
    entropies: Tensor
    lengths: Tensor


def token_logprobs_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy_temperature: float = 1.0,
    differentiable_entropies: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of the distribution it stands in. N rows, V tokens.

    Computed in float32 (float64 for float64 input), whatever the precision of `hidden` and `weight`.
    With z the logits at temperature τ, log p_y = z_y − logsumexp z and entropy = logsumexp z − Σ p·z, both
    over the full vocabulary.

    Args:
        hidden: [N, H] last hidden states, each the one that predicts its target.
        weight: [V, H] output embedding.
        targets: [N] int64.
        bias: [V].
        temperature: of the distribution that the log-probs belong to.
        entropy_temperature: of the distribution that the entropies belong to.
        differentiable_entropies: let gradients through the entropies as well.

    Returns:
        logprobs [N], entropies [N], nats, both float32 (or float64).
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # The casts stand outside, so that gradients over all chunks add up before they are rounded.
    apply: Any = _ChunkedHead.apply
    logprobs, entropies = apply(
        hidden.to(exact),
        weight.to(exact),
        None if bias is None else bias.to(exact),
        targets,
        temperature,
        entropy_temperature,
        chunk_rows,
    )
    return logprobs, entropies if differentiable_entropies else entropies.detach()


class _ChunkedHead(torch.autograd.Function):
    """∂log p_y/∂z = 1_y − p and ∂entropy/∂z = −p·(log p + entropy), with z divided by each temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy_temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperatures, ctx.chunk_rows = (temperature, entropy_temperature), chunk_rows
        logprobs, entropies = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = _logits(hidden[rows], weight, bias)
            log_p = torch.log_softmax(logits / temperature, dim=-1)
            logprobs[rows] = log_p.gather(1, targets[rows, None])[:, 0]
            if entropy_temperature != temperature:
                log_p = torch.log_softmax(logits / entropy_temperature, dim=-1)
            entropies[rows] = -(log_p.exp() * log_p).sum(-1)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropies = grads
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for start in range(0, len(hidden), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            logits = _logits(hidden[rows], weight, bias)
            grad = torch.zeros_like(logits)
            if grad_logprobs is not None:
                pull = grad_logprobs[rows, None] / ctx.temperatures[0]
                grad -= pull * torch.softmax(logits / ctx.temperatures[0], dim=-1)
                grad.scatter_add_(1, targets[rows, None], pull)
            if grad_entropies is not None:
                log_p = torch.log_softmax(logits / ctx.temperatures[1], dim=-1)
                p = log_p.exp()
                entropies = -(p * log_p).sum(-1, keepdim=True)
                grad -= grad_entropies[rows, None] / ctx.temperatures[1] * p * (log_p + entropies)
            grad_hidden[rows] = grad @ weight
            grad_weight.addmm_(grad.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


def completion_logprobs(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    temperature: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> TokenStats:
    """Teacher-forced log-probs and entropies of each row's completion tokens, in one forward pass.

    The rows are right padded together, so the caller bounds the padded tokens; only the positions that
    predict a completion token go through the output embedding.

    Raises:
        FormatError: a row without prompt tokens, longer than the model's context, or with foreign ids.
    """
    _check_rows(model, rows)
    device = model.device
    lengths = np.array([len(completion) for _, completion in rows], dtype=np.int64)
    # The last token of a row predicts nothing we ask for, so it is not fed.
    fed = [np.concatenate(row)[:-1] if len(row[1]) else row[0] for row in rows]
    width = max((len(ids) for ids in fed), default=0)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    attention_mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, ids in enumerate(fed):
        input_ids[i, : len(ids)], attention_mask[i, : len(ids)] = ids, 1
    predicting = [
        i * width + np.arange(len(row[0]) - 1, len(row[0]) - 1 + len(row[1])) for i, row in enumerate(rows)
    ]
    head, decoder = _head_and_decoder(model)
    if not lengths.sum():
        nothing = torch.zeros(0, device=device)
        return TokenStats(nothing, nothing, torch.as_tensor(lengths, device=device))
    states = decoder(
        input_ids=torch.as_tensor(input_ids, device=device),
        attention_mask=torch.as_tensor(attention_mask, device=device),
        use_cache=False,
    ).last_hidden_state  # [R, width, H]
    where = torch.as_tensor(np.concatenate(predicting), device=device)
    targets = torch.as_tensor(np.concatenate([row[1] for row in rows]).astype(np.int64), device=device)
    logprobs, entropies = token_logprobs_and_entropies(
        states.flatten(0, 1).index_select(0, where),
        head.weight,
        targets,
        bias=getattr(head, "bias", None),
        temperature=temperature,
        chunk_rows=chunk_rows,
    )
    return TokenStats(logprobs, entropies, torch.as_tensor(lengths, device=device))


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse a model that does more to its logits than `hidden @ output embedding` (capping, scaling).

    Raises:
        ModelError: its own logits differ from those of `token_logprobs_and_entropies`.
    """
    ids = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    head, decoder = _head_and_decoder(model)
    if head is None:
        raise ModelError(f"{model.name_or_path} has no output embedding. Give a causal language model.")
    states = decoder(input_ids=ids, use_cache=False).last_hidden_state[0].float()
    bias = getattr(head, "bias", None)
    ours = _logits(states, head.weight.float(), None if bias is None else bias.float())
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    scale = max(1.0, float(theirs.abs().max()))
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > HEAD_TOLERANCE * scale:
        raise ModelError(
            f"{model.name_or_path} ({type(model).__name__}) scales or caps its logits, which the fused "
            f"log-probs do not. Use a model whose logits are its hidden states times the output embedding."
        )


def _head_and_decoder(model: Any) -> tuple[Any, Any]:
    """A model's output embedding (None without one), and the part that gives the last hidden states."""
    return model.get_output_embeddings(), model.get_decoder()


def _check_rows(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    vocabulary = int(_head_and_decoder(model)[0].weight.shape[0])
    context = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    for prompt_ids, completion_ids in rows:
        if not len(prompt_ids):
            raise FormatError(
                "A row has no prompt tokens, so nothing predicts its first token. Drop the row."
            )
        if context and len(prompt_ids) + len(completion_ids) > context:
            raise FormatError(
                f"A row has {len(prompt_ids)} prompt and {len(completion_ids)} completion tokens, more than "
                f"the {context} that {model.name_or_path} reads. Export with --max-tokens {context}."
            )
        ids = np.concatenate((prompt_ids, completion_ids))
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise FormatError(
                f"A row holds token id {ids.max() if ids.max() >= vocabulary else ids.min()}, and "
                f"{model.name_or_path} knows 0 to {vocabulary - 1}. Train the model that sampled it."
            )
