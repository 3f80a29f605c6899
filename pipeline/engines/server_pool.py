"""Which endpoint samples which group: back-off for those that fail, copies for what a slow one holds."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import httpx

from pipeline.config import SamplingConfig, ServerConfig
from pipeline.engines.base import BACKLOG_GROUPS, refuse_long_prompts
from pipeline.engines.server_answers import EndpointFault
from pipeline.engines.server_endpoint import Endpoint
from pipeline.engines.server_posts import Job, Post
from pipeline.errors import EngineError, PromptError
from pipeline.records import Group

GRACE_SECONDS = 2.0  # so long the first groups wait for every endpoint's first check, to be shared evenly
TICK_SECONDS = 0.1
MAX_SHOWN = 3  # endpoints in one message

log = logging.getLogger(__name__)


class Pool:
    """Samples each job once; `deliver` gets its group. One event loop, nothing shared with other threads."""

    def __init__(
        self,
        jobs: Sequence[Job],
        endpoints: Sequence[Endpoint],
        config: ServerConfig,
        sampling: SamplingConfig,
        deliver: Callable[[Group], None],
        num_undelivered: Callable[[], int],
    ) -> None:
        """
        Args:
            deliver: called with each group.
            num_undelivered: how many of these still wait to be taken; with too many of them no more begin.
        """
        self.num_undelivered = num_undelivered
        self.jobs, self.config, self.sampling, self.deliver = jobs, config, sampling, deliver
        # a quarter: an endpoint that has sampled nothing yet does not know what is long
        self.posts = [Post(endpoint, config.timeout_seconds / 4) for endpoint in endpoints]
        self.waiting = deque(jobs)
        self.flying: set[Job] = set()
        self.lost: list[tuple[Job, str]] = []
        self.num_open = len(jobs)
        self.is_told = False  # that no endpoint can be reached
        self.changed = asyncio.Event()  # a post or a job did
        self.recoveries: set[asyncio.Task[None]] = set()

    async def run(self, client: httpx.AsyncClient) -> None:
        """Returns when every group is delivered. Closes the client that the endpoints ask through.

        Raises:
            EngineError: no endpoint is left, one needs the user, or groups failed `max_attempts` times;
                in this last case after all the others are delivered.
            PromptError: a prompt does not fit an endpoint's context.
        """
        try:
            async with client, asyncio.TaskGroup() as self.tasks:
                for post in self.posts:
                    self._recover(post)
                await self._dispatch()
                for recovery in self.recoveries:
                    recovery.cancel()
        except BaseExceptionGroup as errors:  # the first ended the others
            raise errors.exceptions[0] from None
        if self.lost:
            prompt, fault = self.lost[0][0].request.prompt, self.lost[0][1]
            raise EngineError(
                f"{len(self.lost)} of {len(self.jobs)} groups failed {self.config.max_attempts} times each, "
                f"such as prompt {prompt.prompt_id} ({prompt.text[:40]!r}) at {fault}. "
                f"The others are sampled; mend the servers and start again for the rest."
            )

    async def _dispatch(self) -> None:
        """Gives groups to the endpoints that are up, the next always to the least busy one."""
        grace = _now() + GRACE_SECONDS
        while self.num_open:
            if _now() > grace or all(post.up or post.failures for post in self.posts):
                while self._start_one():
                    pass
            self.changed.clear()
            with suppress(TimeoutError):  # a group becomes late by time alone
                async with asyncio.timeout(TICK_SECONDS):
                    await self.changed.wait()

    def _start_one(self) -> bool:
        if self.num_undelivered() >= BACKLOG_GROUPS:
            return False
        free = [post for post in self.posts if post.up and len(post.running) < self.config.concurrency]
        for post in sorted(free, key=lambda post: len(post.running)):
            if job := self._next(post):
                job.since = job.since if job.running else _now()
                task = self.tasks.create_task(self._attempt(post, job))
                job.running[post] = task
                post.running.add(task)
                self.flying.add(job)
                # a callback, since a task that is cancelled before its first step runs no `finally`
                task.add_done_callback(partial(self._landed, post))
                return True
        return False

    def _landed(self, post: Post, task: asyncio.Task[None]) -> None:
        post.running.discard(task)
        self.changed.set()

    def _next(self, post: Post) -> Job | None:
        """The next group that waits, or one that takes an endpoint longer than it would take this one."""
        for job in self.waiting:
            if self._may_take(post, job):
                self.waiting.remove(job)
                return job
        late = [
            job
            for job in self.flying
            if len(job.running) == 1
            and post not in job.running
            and _now() - job.since > post.patience_seconds
            and self._may_take(post, job)
        ]
        return min(late, key=lambda job: job.since, default=None)

    def _may_take(self, post: Post, job: Job) -> bool:
        """A group goes back to where it failed only when it failed everywhere else, too."""
        return all(job.faults[post] <= job.faults[other] for other in self.posts if other.up)

    async def _attempt(self, post: Post, job: Job) -> None:
        began = _now()
        try:
            with post.faults():
                group = await post.endpoint.group(job.request, job.prompt_ids, self.sampling)
        except EndpointFault as fault:
            self._failed(post, job, fault)
            return
        post.sampled_one(_now() - began)
        if not job.finished:
            self._settle(job)
            self.deliver(group)
            for other, task in job.running.items():
                if other is not post:
                    task.cancel()

    def _failed(self, post: Post, job: Job, fault: EndpointFault) -> None:
        job.running.pop(post)
        job.faults[post] += 1
        if post.up:  # else another of the same burst took it down
            post.goes_down(fault, _now())
            self._recover(post)
        self._give_up()
        if job.finished or job.running:
            return
        if job.faults.total() >= self.config.max_attempts:
            self.lost.append((job, f"{post.endpoint.url}: {fault}"))
            self._settle(job)
        else:
            self.flying.discard(job)
            self.waiting.appendleft(job)

    def _settle(self, job: Job) -> None:
        job.finished = True
        self.flying.discard(job)
        self.num_open -= 1

    def _recover(self, post: Post) -> None:
        recovery = self.tasks.create_task(self._until_up(post))
        self.recoveries.add(recovery)
        recovery.add_done_callback(self.recoveries.discard)

    async def _until_up(self, post: Post) -> None:
        """Checks an endpoint, after a back-off where it failed, until it may be used."""
        first = self.jobs[0]
        while not post.up:
            if post.failures:
                await asyncio.sleep(post.backoff_seconds())
            try:
                with post.faults():
                    await post.endpoint.check(first.request.prompt.text, first.prompt_ids)
                    self._refuse_long_prompts(post.endpoint)
                post.comes_up()
                self.is_told = False
            except EndpointFault as fault:
                post.goes_down(fault, _now())
                self._give_up()
            self.changed.set()
        names = {other.endpoint.model: other.endpoint.url for other in self.posts if other.up}
        if len(names) > 1:
            different = " and ".join(f"`{name}` ({url})" for name, url in names.items())
            raise EngineError(
                f"The endpoints serve different models: {different}. "
                f"Name the one to sample from in engine.server.model."
            )

    def _refuse_long_prompts(self, endpoint: Endpoint) -> None:
        requests, prompts = [job.request for job in self.jobs], [job.prompt_ids for job in self.jobs]
        try:
            refuse_long_prompts(requests, prompts, self.sampling, endpoint.context)
        except PromptError as error:
            raise PromptError(f"{endpoint.url}: {error}") from None

    def _give_up(self) -> None:
        """Ends the pool when every endpoint failed too often and nothing is on its way that may still do."""
        current = asyncio.current_task()
        hope = any(task is not current and not task.done() for post in self.posts for task in post.running)
        if hope or not all(post.is_lost(self.config, _now()) for post in self.posts):
            self._tell_of_waiting()
            return
        shown = "; ".join(f"{post.endpoint.url}: {post.fault}" for post in self.posts[:MAX_SHOWN])
        more = len(self.posts) - MAX_SHOWN
        raise EngineError(
            f"No endpoint samples: {shown}{f'; and {more} more' if more > 0 else ''}. Start the servers "
            f"(`vllm serve MODEL`), or mend engine.server.endpoints; then start again, finished groups stay."
        )

    def _tell_of_waiting(self) -> None:
        """Says once that everything waits for servers that cannot be reached."""
        enough = self.config.max_attempts
        away = [post for post in self.posts if post.failures >= enough and post.unreachable_since is not None]
        if not self.is_told and len(away) == len(self.posts):
            self.is_told = True
            log.warning(
                "No endpoint can be reached; asking again for %g s (engine.server.patience_seconds).",
                self.config.patience_seconds,
            )


def _now() -> float:
    return asyncio.get_running_loop().time()
