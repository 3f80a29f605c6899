"""What a pool of servers knows of a group on its way, and of an endpoint that may sample it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.config import ServerConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.server_answers import EndpointFault, Refusal, Unreachable
from pipeline.engines.server_endpoint import Endpoint
from pipeline.errors import EngineError, PromptError
from pipeline.records import Int32

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A group on its way.

    Attributes:
        running: the attempts in flight; two where a second endpoint helps a slow one.
        since: when the first of these began, in the event loop's seconds.
        faults: attempts that failed, by endpoint.
    """

    request: GroupRequest
    prompt_ids: Int32
    running: dict[Post, asyncio.Task[None]] = field(default_factory=dict)
    since: float = 0.0
    faults: Counter[Post] = field(default_factory=Counter)
    finished: bool = False


@dataclass(eq=False)
class Post:
    """An endpoint and how it does.

    Attributes:
        up: it passed its check and has not failed since.
        failures: since its last good group; those of one burst count once.
        patience_seconds: a group that is on its way elsewhere for longer gets a copy here. It is the
            longest that a group took here, where one did.
        unreachable_since: the first of the latest attempts that reached nobody, in the event loop's seconds.
    """

    endpoint: Endpoint
    patience_seconds: float
    up: bool = False
    was_up: bool = False
    failures: int = 0
    good_groups: int = 0
    fault: str = ""
    unreachable_since: float | None = None
    running: set[asyncio.Task[None]] = field(default_factory=set)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """What an endpoint refuses is the user's to mend. Where it has sampled before, its setup was changed,
        which is a fault that leaves the night to the others."""
        try:
            yield
        except (EngineError, PromptError) as error:
            if not self.good_groups:
                raise
            said = error.fault if isinstance(error, Refusal) else str(error).removeprefix(self.endpoint.url)
            raise EndpointFault(said.strip(": .")) from None

    def comes_up(self) -> None:
        self.up, self.was_up, self.unreachable_since = True, True, None

    def goes_down(self, fault: EndpointFault, now: float) -> None:
        self.up, self.fault = False, str(fault)
        self.failures += 1
        if not isinstance(fault, Unreachable):
            self.unreachable_since = None
        elif self.unreachable_since is None:
            self.unreachable_since = now
        if self.failures == 1:
            log.warning("%s is left out for now: %s.", self.endpoint.url, fault)

    def sampled_one(self, seconds: float) -> None:
        if self.failures:
            log.warning("%s samples again.", self.endpoint.url)
        self.failures = 0
        self.patience_seconds = max(self.patience_seconds, seconds) if self.good_groups else seconds
        self.good_groups += 1

    def is_lost(self, config: ServerConfig, now: float) -> bool:
        """Whether it failed too often; one that was there may be starting again, and gets its time."""
        if self.up or self.failures < config.max_attempts:
            return False
        if not self.was_up:  # a mistyped address, most likely
            return True
        return self.unreachable_since is None or now - self.unreachable_since >= config.patience_seconds

    def backoff_seconds(self) -> float:
        """Up to 0.5 s after the first failure, then up to twice as long each time; at random, since several
        nights may share a server."""
        # the exponent is bounded, since a server may stay away for a thousand attempts
        longest = FIRST_BACKOFF_SECONDS * 2.0 ** min(self.failures - 1, 20)
        return min(longest, LONGEST_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)
