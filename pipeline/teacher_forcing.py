"""Forward passes over many rollouts: like lengths together, and a prompt that several share is read once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.logprobs import Row, TokenStats, completion_logprobs, head_stats, last_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Scores: TypeAlias = tuple[list[int], TokenStats]  # which rows, and what is known of their completions


def forward_passes(model: PreTrainedModel, rows: Sequence[Row], batch_tokens: int) -> Iterator[Scores]:
    """Log-probs and entropies of all rows, a forward pass at a time.

    Rows must fit the model: prompts of one token at least, no more tokens than its context, no foreign ids.

    Args:
        batch_tokens: padded tokens of a pass; a row that is longer goes alone. Reading shared prompts takes
            as many again.
    """
    families: dict[bytes, list[int]] = {}
    for index, (prompt, _) in enumerate(rows):
        families.setdefault(prompt.tobytes(), []).append(index)
    can_share = _reads_prompts_once(model)
    shared = [family for family in families.values() if can_share and len(family) > 1]
    alone = [index for family in families.values() if not can_share or len(family) == 1 for index in family]
    # The longest first: memory that suffices for them suffices for all.
    shared.sort(key=lambda family: -len(rows[family[0]][0]))
    for together in _within(shared, batch_tokens, lambda family: len(rows[family[0]][0])):
        yield from _Prompts(model, rows, together).passes(batch_tokens)
    alone.sort(key=lambda index: -_num_tokens(rows[index]))
    for indices in _within(alone, batch_tokens, lambda index: _num_tokens(rows[index])):
        yield indices, completion_logprobs(model, [rows[index] for index in indices], precise=True)


def _within(items: Sequence[T], budget: int, num_tokens: Callable[[T], int]) -> Iterator[list[T]]:
    """Parts of items, the longest first: `budget` tokens padded to a part's first, one item at least."""
    begin = 0
    while begin < len(items):
        end = begin + max(1, budget // num_tokens(items[begin]))
        yield list(items[begin:end])
        begin = end


def _num_tokens(row: Row) -> int:
    return len(row[0]) + len(row[1])


def _reads_prompts_once(model: Any) -> bool:
    """Whether a model's memory of a prompt is keys and values alone, which can be repeated row by row."""
    layers = DynamicCache(config=model.config).layers
    positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    return positions and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class _Prompts:
    """K prompts that were read together, and the rows that go on from them. P = tokens of the longest."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], families: list[list[int]]) -> None:
        self.model, self.rows = model, rows
        self.family_of = {index: k for k, family in enumerate(families) for index in family}
        prompts = [rows[family[0]][0] for family in families]
        # Padding stands on the left, so that every completion follows its prompt directly.
        ids, mask = np.zeros((2, len(prompts), max(map(len, prompts))), np.int64)
        for k, prompt in enumerate(prompts):
            ids[k, -len(prompt) :], mask[k, -len(prompt) :] = prompt, 1
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.mask = torch.as_tensor(mask, device=model.device)
        self.cache: Any = DynamicCache()
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        states = last_states(
            model,
            ids,
            precise=True,
            attention_mask=self.mask,
            position_ids=torch.as_tensor(positions, device=model.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.states = states[:, -1].clone()  # [K, H] predict the first completion tokens

    def passes(self, batch_tokens: int) -> Iterator[Scores]:
        """The longest completions first, so that memory that suffices for them suffices for all."""
        by_length = sorted(self.family_of, key=lambda index: -len(self.rows[index][1]))
        prompt_tokens = self.mask.shape[1]
        for indices in _within(by_length, batch_tokens, lambda i: prompt_tokens + len(self.rows[i][1])):
            yield indices, self._stats(indices)

    def _stats(self, indices: list[int]) -> TokenStats:
        """Of the completions of R rows, T tokens the longest."""
        completions = [self.rows[index][1] for index in indices]
        lengths = np.array([len(completion) for completion in completions])
        family = torch.as_tensor([self.family_of[index] for index in indices], device=self.model.device)
        ids = np.zeros((len(indices), max(1, int(lengths.max()))), np.int64)
        for row, completion in zip(ids, completions, strict=True):
            row[: len(completion)] = completion
        states = self.states[family][:, None]
        if ids.shape[1] > 1:
            states = torch.cat([states, self._read(ids[:, :-1], family)], dim=1)
        of_completion = np.arange(ids.shape[1]) < lengths[:, None]  # [R, T]
        wanted = torch.as_tensor(of_completion, device=self.model.device)
        return head_stats(self.model, states[wanted], ids[of_completion], lengths)

    def _read(self, ids: np.ndarray, family: Tensor) -> Tensor:
        """[R, T − 1, H] states of completions [R, T − 1], padded on the right, each after its prompt."""
        of_prompts = [(layer.keys[family], layer.values[family]) for layer in self.cache.layers]
        starts = self.lengths[family.cpu().numpy()]
        positions = torch.as_tensor(starts[:, None] + np.arange(ids.shape[1]), device=family.device)
        completion_mask = self.mask.new_ones(ids.shape)
        return last_states(
            self.model,
            ids,
            precise=True,
            attention_mask=torch.cat([self.mask[family], completion_mask], dim=1),
            position_ids=positions,
            past_key_values=DynamicCache(of_prompts),
            use_cache=True,
        )
