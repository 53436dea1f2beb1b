"""What stands for the model: tokens in time, KV blocks, counters. A cancelled request leaves nothing running."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.vllm import tokens
from tests.fakes.vllm.errors import VllmError
from tests.fakes.vllm.kv import KvError, Params
from tests.fakes.vllm.links import Link, TooLittle
from tests.fakes.vllm.metrics import Metrics
from tests.fakes.vllm.requests import Sampled
from tests.fakes.vllm.settings import Settings

NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One token of one choice; ``finish`` is set on the choice's last."""

    choice: int
    token: int
    text: str
    finish: str | None


@dataclass(slots=True)
class Choice:
    """A whole choice."""

    index: int
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    finish: str = "length"

    @property
    def text(self) -> str:
        return tokens.decode(self.ids)


@dataclass(slots=True)
class Job:
    """One request to the engine."""

    id: str
    prompts: list[list[int]]
    request: Sampled
    limit: int | None
    """Most tokens to generate for each choice; None: as many as fit."""
    rank: list[str] = field(default_factory=list)
    """What its headers say of the rank that is to compute it."""
    finish: str = "length"
    """How it ended."""

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


class Engine:
    """Runs jobs."""

    def __init__(self, settings: Settings, metrics: Metrics, link: Link) -> None:
        self.settings, self.metrics, self.link = settings, metrics, link
        self.jobs = 0
        """Under way."""
        self.computed: Callable[[list[int]], None] = lambda prompt: None
        """Called with each prompt that is in the KV cache from now on."""
        self.rejected: Callable[[str], None] = lambda reason: None
        """Called with the reason when KV parameters are refused."""

    def room(self, job: Job) -> int:
        """Tokens that fit behind the longest prompt."""
        return self.settings.max_model_len - max(len(prompt) for prompt in job.prompts)

    def check(self, job: Job) -> None:
        """Raise VllmError for a job that does not fit."""
        if (job.limit or 1) > self.room(job):
            raise VllmError(
                f"This model's maximum context length is {self.settings.max_model_len} tokens, but the prompt and "
                f"{job.limit} output tokens were asked for."
            )

    async def steps(self, job: Job) -> AsyncGenerator[Step, None]:
        """The tokens of all choices, in turns. Close the iterator (``aclosing``) when it is left early."""
        limit = self.room(job) if job.limit is None else job.limit
        began = time.monotonic()
        with self._counted(job) as end:
            try:
                source = await self._load(job)
            except TooLittle:
                end("cache_threshold")
                for index in range(len(job.prompts) * job.request.n):
                    yield Step(index, NO_TOKEN, "", "cache_threshold")
                return
            await asyncio.sleep(self.settings.prefill_s if source == "local_compute" else 0)
            self.metrics.prompt(job.prompt_tokens, source)
            for prompt in job.prompts:
                self.computed(prompt)
            self.metrics.ttft.observe(time.monotonic() - began)
            numbered = [(p, i) for p in job.prompts for i in range(job.request.n)]
            answers = {index: tokens.Answer(p, i) for index, (p, i) in enumerate(numbered)}
            reason = "length"
            for position in range(limit):
                if position:
                    await asyncio.sleep(self.settings.token_s)
                    self.metrics.itl.observe(self.settings.token_s)
                for index, answer in list(answers.items()):
                    token, stop = answer.token(position)
                    stop = stop and not job.request.ignore_eos and position + 1 >= job.request.min_tokens
                    reason = "stop" if stop else "length"
                    finish = reason if stop or position + 1 == limit else None
                    if finish:
                        del answers[index]
                    self.metrics.generation_tokens.inc()
                    yield Step(index, token, tokens.decode([token]), finish)
            end(reason)
            job.finish = reason
            self.metrics.e2e.observe(time.monotonic() - began)

    async def choices(self, job: Job) -> list[Choice]:
        """All choices at once."""
        prompts = [p for p in job.prompts for _ in range(job.request.n)]
        done = [Choice(index, prompt) for index, prompt in enumerate(prompts)]
        async for step in self.steps(job):
            done[step.choice].ids += [step.token] if step.token != NO_TOKEN else []
            done[step.choice].finish = step.finish or done[step.choice].finish
        return done

    def minted(self, job: Job) -> Params | None:
        """The ``kv_transfer_params`` that go into the answer of a prefill leg."""
        return self.link.done(job, job.finish)

    async def _load(self, job: Job) -> str:
        """Where the prompt's KV comes from. Raises TooLittle."""
        try:
            return await self.link.load(job)
        except KvError as error:
            self.rejected(f"{self.settings.connector}: {error}")
            raise VllmError(str(error), status=500, type="InternalServerError") from None

    @contextmanager
    def _counted(self, job: Job) -> Any:
        """Count the job as running; how it ended is ``abort`` unless the block says otherwise."""
        reason = "abort"

        def end(how: str) -> None:
            nonlocal reason
            reason = how

        self.metrics.running.inc()
        self.jobs += 1
        try:
            yield end
        except VllmError:
            reason = "error"
            raise
        finally:
            self.jobs -= 1
            if reason in ("abort", "error"):
                self.link.left(job)
            self.metrics.running.dec()
            self.metrics.ended(reason)
