"""The entropy tap: measures each row of logits where it is made, and keeps three numbers a token.

The tap also draws the token, with the sample's own noise, and so knows the token's log-probability at once:
nothing is left for the engine's sampler but to take the row's greatest logit. Both follow from (sample,
position) alone. A row computed twice (a prompt still being read in pieces, a request resumed after
preemption) draws the same noise and is written to the same place, so it never counts twice.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engines.sampling import DrawRule, draw, measure, noise
from pipeline.records import Float32, Int32

TAP_ARGUMENT = "echomine"  # the key of a request's extra arguments that is ours
PENDING_ROWS = 16_384  # rows whose numbers wait on the device before they are fetched
_CERTAIN = 1e30  # a logit that every sampler takes; finite, so that no softmax turns into NaN
_ROW = np.dtype([("token", np.int32), ("logprob", np.float32), ("entropy", np.float32)])


@dataclass(frozen=True)
class TapRequest:
    """What a request tells the tap of itself.

    Attributes:
        key: unique among the running requests of an engine.
        seed: of the sample's noise.
        draws: whether the tap draws the token; otherwise it measures only: rows may be shifted by a constant,
            which changes no softmax.
    """

    key: str
    seed: int
    max_tokens: int
    rule: DrawRule
    draws: bool = True

    def as_arguments(self) -> dict[str, Any]:
        """For `SamplingParams.extra_args`: plain values, that travel between processes."""
        return {TAP_ARGUMENT: asdict(self)}

    @classmethod
    def of(cls, extra_args: dict[str, Any] | None) -> TapRequest | None:
        """The request behind extra arguments; None for a request that is not ours."""
        if not extra_args or TAP_ARGUMENT not in extra_args:
            return None
        values = dict(extra_args[TAP_ARGUMENT])
        return cls(**(values | {"rule": DrawRule(**values["rule"])}))


@dataclass
class Tapped:
    """A running request: its noise, and what was measured of it so far, by position in the completion."""

    request: TapRequest
    rule_index: int  # the same for requests that are drawn by the same rule
    number: int  # never that of another request
    noise: array[float] = field(init=False)  # [max_tokens]; its elements are read one by one
    rows: NDArray[Any] = field(init=False)  # [max_tokens] of _ROW; NaN where nothing was measured
    num_tokens: int = 0  # positions up to the last that was measured

    def __post_init__(self) -> None:
        self.noise = array("d", noise(self.request.seed, self.request.max_tokens).tobytes())
        self.rows = np.full(self.request.max_tokens, np.array((-1, np.nan, np.nan), dtype=_ROW))


@dataclass(frozen=True)
class Measured:
    """What the tap knows of a finished request; T positions, of which the last may be cut off later.

    Attributes:
        tokens: [T] as drawn, or −1 where the tap only measured.
        logprobs: [T] nats, or NaN where the tap only measured.
        entropies: [T] nats.
    """

    tokens: Int32
    logprobs: Float32
    entropies: Float32

    @classmethod
    def from_bytes(cls, packed: bytes) -> Measured:
        rows = np.frombuffer(packed, dtype=_ROW)
        return cls(rows["token"].copy(), rows["logprob"].copy(), rows["entropy"].copy())


class EntropyTap:
    """Lives where the logits are; one for each engine."""

    def __init__(self) -> None:
        self._running: dict[str, Tapped] = {}
        self._numbers = count()
        self._rules: dict[tuple[DrawRule, bool], int] = {}
        self._places: list[tuple[int, int]] = []  # number of the request, position: of what waits
        self._pending: list[Tensor] = []  # [3, rows] each

    def open(self, request: TapRequest) -> Tapped:
        """The state of a request that enters the batch; of one that was preempted, the state it had."""
        tapped = self._running.get(request.key)
        if tapped is None:
            rule_index = self._rules.setdefault((request.rule, request.draws), len(self._rules))
            tapped = self._running[request.key] = Tapped(request, rule_index, next(self._numbers))
        return tapped

    def apply(self, logits: Tensor, rows: Sequence[tuple[int, Tapped, int]]) -> None:
        """Measures rows of [B, V] float32 logits and, where asked, makes the drawn token certain, in place.

        Args:
            rows: (row, request, position in its completion). A position that no token will stand in is passed
                over: a prompt that is still being read has a negative one, and a request that has all its
                tokens may run one step too long.
        """
        by_rule: dict[int, list[tuple[int, Tapped, int]]] = {}
        for place in rows:
            _, tapped, position = place
            if 0 <= position < len(tapped.noise):
                by_rule.setdefault(tapped.rule_index, []).append(place)
        for group in by_rule.values():
            request = group[0][1].request
            self._apply(logits, group, request.rule, request.draws)

    def _apply(
        self, logits: Tensor, rows: Sequence[tuple[int, Tapped, int]], rule: DrawRule, draws: bool
    ) -> None:
        every = [row for row, _, _ in rows] == list(range(len(logits)))
        index = None if every else torch.tensor([row for row, _, _ in rows], device=logits.device)
        ours = logits if index is None else logits[index]
        if draws:
            # float32 would round the greatest of them to 1, which no weight lies beyond
            values = [tapped.noise[position] for _, tapped, position in rows]
            uniforms = torch.tensor(values, dtype=torch.float64)
            drawn = draw(ours, uniforms.to(logits.device, non_blocking=True), rule)
            where = torch.arange(len(logits), device=logits.device) if index is None else index
            logits.index_put_((where, drawn.tokens), logits.new_tensor(_CERTAIN))
            columns = [drawn.tokens.double(), drawn.logprobs.double(), drawn.entropies.double()]
        else:
            tempered = rule.entropy_kind == "full_vocab_tempered" and rule.temperature != 1.0
            entropies = measure(ours / rule.temperature if tempered else ours)[2].double()
            columns = [torch.full_like(entropies, -1), torch.full_like(entropies, torch.nan), entropies]
        self._pending.append(torch.stack(columns))
        self._places += [(tapped.number, position) for _, tapped, position in rows]
        if len(self._places) >= PENDING_ROWS:
            self._fetch()

    def take(self, keys: Iterable[str]) -> dict[str, bytes]:
        """What was measured of requests that are finished, packed for `Measured.from_bytes`; then forgotten.

        A key that is not known is left out.
        """
        self._fetch()
        taken = {}
        for key in keys:
            tapped = self._running.pop(key, None)
            if tapped is not None:
                taken[key] = tapped.rows[: tapped.num_tokens].tobytes()
        return taken

    def forget(self, keys: Iterable[str]) -> None:
        """Drops requests that were given up."""
        for key in keys:
            self._running.pop(key, None)

    def __len__(self) -> int:
        """Requests that are held."""
        return len(self._running)

    def _fetch(self) -> None:
        """Brings what waits on the device to the host, in one copy, and puts it in its places in order."""
        if not self._pending:
            return
        values = torch.cat(self._pending, dim=1).cpu().numpy()
        places = np.array(self._places)  # [N, 2]
        self._places, self._pending = [], []
        by_request = np.argsort(places[:, 0], kind="stable")  # of a position measured twice the last stays
        rows = np.empty(len(by_request), _ROW)
        for name, column in zip(_ROW.names or (), values, strict=True):
            rows[name] = column[by_request]
        numbers, positions = places[by_request].T
        running = {tapped.number: tapped for tapped in self._running.values()}
        begins = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
        for begin, end in pairwise([*begins, len(rows)]):
            tapped = running.get(int(numbers[begin]))  # None: taken or given up meanwhile
            if tapped is not None:
                of_request = positions[begin:end]
                tapped.rows[of_request] = rows[begin:end]
                tapped.num_tokens = max(tapped.num_tokens, int(of_request.max()) + 1)
