"""Log-probabilities and entropies of tokens under a causal language model, without a [N, V] tensor.

The trainer's losses and the scorer both read a model through here: hidden states go through the output
embedding a block of rows and vocabulary at a time (`pipeline/chunked_head.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.chunked_head import ChunkedHead, linear
from pipeline.errors import FormatError, ModelError
from pipeline.packing import Sequences, can_pack, packed_attention
from pipeline.records import Int32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row: TypeAlias = tuple[Int32, Int32]  # prompt ids [P], completion ids [T]

# Logits that exist at once: 4 MB of float32, about a CPU's cache, and 64 MB on a GPU. Not tuned on either.
CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**24}
NO_LIMIT = 2**31  # the context of a model that names none
HEAD_TOLERANCE = 1e-2  # nats per logit; bfloat16 heads round their logits to about this


@dataclass(frozen=True)
class TokenStats:
    """The completions of R rows, one after the other: N = sum of their lengths.

    Attributes:
        logprobs: [N] nats, differentiable.
        entropies: [N] nats, at temperature 1, detached unless gradients through them were asked for.
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
    chunk_logits: int | None = None,
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
        entropy_temperature: of the distribution that the entropies belong to: 1 for those of the lake and of
            metrics, the sampling temperature for an entropy bonus as verl takes it.
        differentiable_entropies: let gradients through the entropies as well, for objectives with an entropy
            bonus (UFT, LUFFY).
        chunk_logits: how many logits exist at once; by default what suits the device.

    Returns:
        logprobs [N], entropies [N], nats, both float32 (or float64).
    """
    chunk = chunk_logits or CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cpu"])
    apply: Any = ChunkedHead.apply
    logprobs, entropies = apply(hidden, weight, bias, targets, temperature, entropy_temperature, chunk)
    return logprobs, entropies if differentiable_entropies else entropies.detach()


def completion_logprobs(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    temperature: float = 1.0,
    entropy_temperature: float = 1.0,
    precise: bool = False,
    differentiable_entropies: bool = False,
) -> TokenStats:
    """Teacher-forced log-probs and entropies of each row's completion tokens, in one forward pass.

    The rows are packed one after the other; where the model cannot do so, they are right padded together. The
    caller bounds the tokens. Only the positions that predict a completion token go through the output
    embedding.

    Args:
        precise: see `last_states`.
        temperature, entropy_temperature, differentiable_entropies: see `token_logprobs_and_entropies`.

    Raises:
        FormatError: a row without prompt tokens, longer than the model's context, or with foreign ids.
    """
    _check_rows(model, rows)
    lengths = np.array([len(completion) for _, completion in rows], dtype=np.int64)
    if not lengths.sum():
        nothing = torch.zeros(0, device=model.device)
        return TokenStats(nothing, nothing, torch.as_tensor(lengths, device=model.device))
    states, predicting = (_packed if can_pack(model) else _padded)(model, rows, lengths, precise)
    predicting_states = states.index_select(0, torch.as_tensor(predicting, device=model.device))
    targets = np.concatenate([completion for _, completion in rows])
    return head_stats(
        model,
        predicting_states,
        targets,
        lengths,
        temperature=temperature,
        entropy_temperature=entropy_temperature,
        differentiable_entropies=differentiable_entropies,
    )


def last_states(
    model: PreTrainedModel, input_ids: NDArray[np.int64], *, precise: bool, **given: Any
) -> Tensor:
    """[R, W, H] last hidden states of [R, W] ids; `given` goes to the model's decoder.

    Args:
        precise: where the weights are bfloat16, keep the residual stream and the norms in float32. The mean
            error is then 0.6 times as large on SmolLM2-135M (docs/decisions.md).
    """
    _, decoder = _head_and_decoder(model)
    ids = torch.as_tensor(input_ids, device=model.device)
    if precise and model.dtype == torch.bfloat16:
        embedded = decoder.get_input_embeddings()(ids).float()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            output = decoder(inputs_embeds=embedded, **given)
    else:
        output = decoder(input_ids=ids, **given)
    states: Tensor = output.last_hidden_state
    return states


def head_stats(
    model: PreTrainedModel,
    states: Tensor,
    targets: NDArray[np.integer],
    lengths: NDArray[np.int64],
    *,
    temperature: float = 1.0,
    entropy_temperature: float = 1.0,
    differentiable_entropies: bool = False,
) -> TokenStats:
    """What the output embedding makes of [N, H] states, each of which predicts one of N targets."""
    head, _ = _head_and_decoder(model)
    logprobs, entropies = token_logprobs_and_entropies(
        states,
        head.weight,
        torch.as_tensor(targets.astype(np.int64), device=states.device),
        bias=getattr(head, "bias", None),
        temperature=temperature,
        entropy_temperature=entropy_temperature,
        differentiable_entropies=differentiable_entropies,
    )
    return TokenStats(logprobs, entropies, torch.as_tensor(lengths, device=states.device))


def _packed(
    model: PreTrainedModel, rows: Sequence[Row], lengths: NDArray[np.int64], precise: bool
) -> tuple[Tensor, NDArray[np.int64]]:
    """[M, H] states of the rows' tokens, and which [N] of them predict completion tokens.

    Rows of equal length are neighbours, as attention over them is one call. The last token of a row predicts
    nothing we ask for, so it is not fed; nor is a row without a completion.
    """
    fed = np.array([len(prompt) for prompt, _ in rows]) + lengths - 1
    order = [int(row) for row in np.argsort(-fed, kind="stable") if lengths[row]]
    ids = np.concatenate([np.concatenate((rows[row][0], rows[row][1][:-1])) for row in order])
    sequences = Sequences.of([int(fed[row]) for row in order], model.device)
    with packed_attention(model):
        states = last_states(
            model,
            ids[None].astype(np.int64),
            precise=precise,
            use_cache=False,
            position_ids=sequences.position_ids,
            sequences=sequences,
        )
    ends = np.zeros(len(rows), dtype=np.int64)
    ends[order] = np.cumsum(fed[order])
    return states[0], _last_positions(ends, lengths)


def _padded(
    model: PreTrainedModel, rows: Sequence[Row], lengths: NDArray[np.int64], precise: bool
) -> tuple[Tensor, NDArray[np.int64]]:
    """[R · W, H] states of R rows of W tokens, and which [N] of them predict completion tokens."""
    fed = np.array([len(prompt) for prompt, _ in rows]) + np.maximum(lengths - 1, 0)
    input_ids = np.zeros((len(rows), int(fed.max())), dtype=np.int64)
    for row, num_fed, (prompt, completion) in zip(input_ids, fed, rows, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : num_fed] = completion[:-1]
    # Padding stands on the right, where no token looks: plain causal attention needs no mask for it.
    states = last_states(model, input_ids, precise=precise, use_cache=False).flatten(0, 1)
    return states, _last_positions(np.arange(len(rows)) * input_ids.shape[1] + fed, lengths)


def _last_positions(ends: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] positions: the last `lengths` before each of `ends`, row after row."""
    return np.arange(lengths.sum()) + np.repeat(ends - np.cumsum(lengths), lengths)


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
    ours = linear(states, head.weight, bias, slice(None), torch.float32)
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    scale = max(1.0, float(theirs.abs().max()))
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > HEAD_TOLERANCE * scale:
        raise ModelError(
            f"{model.name_or_path} ({type(model).__name__}) scales or caps its logits, which the fused "
            f"log-probs do not. Use a model whose logits are its hidden states times the output embedding."
        )


def context_and_vocabulary(model: PreTrainedModel) -> tuple[int, int]:
    """How many tokens a model reads at most, and how many token ids it knows."""
    context = int(getattr(model.config, "max_position_embeddings", 0) or NO_LIMIT)
    return context, int(_head_and_decoder(model)[0].weight.shape[0])


def _head_and_decoder(model: Any) -> tuple[Any, Any]:
    """A model's output embedding (None without one), and the part that gives the last hidden states."""
    return model.get_output_embeddings(), model.get_decoder()


def _check_rows(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    context, vocabulary = context_and_vocabulary(model)
    for prompt_ids, completion_ids in rows:
        if not len(prompt_ids):
            raise FormatError(
                "A row has no prompt tokens, so nothing predicts its first token. Leave it out."
            )
        if len(prompt_ids) + len(completion_ids) > context:
            raise FormatError(
                f"A row has {len(prompt_ids)} prompt and {len(completion_ids)} completion tokens, more than "
                f"the {context} that {model.name_or_path} reads. Leave such rows "
                "out, or give a model of longer context."
            )
        ids = np.concatenate((prompt_ids, completion_ids))
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise FormatError(
                f"A row holds token id {ids.max() if ids.max() >= vocabulary else ids.min()}, and "
                f"{model.name_or_path} knows 0 to {vocabulary - 1}. "
                "Give the model whose tokenizer made the row."
            )
