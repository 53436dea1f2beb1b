"""Names and commits: what is remembered, for how long, and what happens when the registry is away."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import Forbidden, HeliosError, InvalidInput, NotFound, RepoNotFound, Retired, Unavailable
from helios.metrics import RouterMetrics
from helios.registry_answers import Notice
from router.discovery import models as module
from router.discovery.models import RETRY_S, UNKNOWN_S, Models, Name, Resolution
from router.discovery.registry import resolution

NAME = Name.parse("org/name@champion")


class Registry:
    """What it says is set; questions are counted, and can be kept waiting."""

    def __init__(self, **options: float) -> None:
        self.says: dict[Name, str | HeliosError] = {NAME: "a" * 40}
        self.now, self.asked = 0.0, 0
        self.open = asyncio.Event()
        self.open.set()
        self.models = Models(self.ask, 30, options.get("timeout_s", 5), RouterMetrics(), clock=lambda: self.now)

    async def ask(self, name: Name) -> Resolution:
        self.asked += 1
        await self.open.wait()
        said = self.says.get(name) or RepoNotFound("there is none")
        if isinstance(said, HeliosError):
            raise said
        return Resolution(name, said)

    async def settle(self) -> None:
        while self.models._asked:
            await asyncio.sleep(0)

    async def commit(self, name: Name = NAME) -> str:
        return (await self.models.resolve(name)).commit


def scenario(run):
    def test():
        async def whole():
            registry = Registry()
            await run(registry)
            await registry.models.close()

        asyncio.run(whole())

    test.__name__ = run.__name__
    return test


@scenario
async def test_many_who_want_to_know_ask_once(registry):
    registry.open.clear()
    waiting = [asyncio.create_task(registry.commit()) for _ in range(50)]
    await asyncio.sleep(0)
    assert registry.models.known(NAME) is None
    registry.open.set()
    assert set(await asyncio.gather(*waiting)) == {"a" * 40}
    assert registry.asked == 1
    registry.now = 29.9
    assert (await registry.commit(), registry.asked) == ("a" * 40, 1)


@scenario
async def test_what_is_stale_is_answered_at_once_and_renewed_behind_that(registry):
    await registry.commit()
    registry.says[NAME], registry.now = "b" * 40, 31
    registry.open.clear()
    assert (await registry.commit(), await registry.commit()) == ("a" * 40, "a" * 40)
    registry.open.set()
    await registry.settle()
    assert (await registry.commit(), registry.asked) == ("b" * 40, 2)


@scenario
async def test_the_last_that_was_known_counts_while_the_registry_is_away(registry):
    await registry.commit()
    registry.says[NAME], registry.now = Unavailable("away"), 1e6
    for _ in range(3):
        assert await registry.commit() == "a" * 40
        await registry.settle()
    assert registry.asked == 2, "and it is left alone for a while"
    registry.now += RETRY_S + 1
    registry.says[NAME] = "b" * 40
    await registry.commit()
    await registry.settle()
    assert await registry.commit() == "b" * 40


@scenario
async def test_a_name_that_was_never_known_is_unavailable_while_the_registry_is_away(registry):
    registry.says[NAME] = Unavailable("away")
    with pytest.raises(Unavailable, match="away"):
        await registry.commit()
    registry.says[NAME], registry.now = "a" * 40, RETRY_S
    assert await registry.commit() == "a" * 40


@scenario
async def test_a_registry_that_refuses_to_say_is_no_answer(registry):
    registry.says[NAME] = Forbidden("no")
    with pytest.raises(Unavailable, match="can't be resolved: no"):
        await registry.commit()


@scenario
async def test_a_no_counts_for_a_shorter_time(registry):
    other = Name.parse("org/other")
    for _ in range(3):
        with pytest.raises(NotFound):
            await registry.commit(other)
    assert registry.asked == 1
    registry.now, registry.says[other] = UNKNOWN_S, "c" * 40
    with pytest.raises(NotFound):
        await registry.commit(other)
    await registry.settle()
    assert await registry.commit(other) == "c" * 40


@scenario
async def test_what_is_retired_is_an_error_from_the_next_question_on(registry):
    await registry.commit()
    registry.says[NAME], registry.now = Retired("it was wrong"), 31
    await registry.commit()
    await registry.settle()
    with pytest.raises(Retired, match="it was wrong"):
        await registry.commit()


def test_a_registry_that_hangs_is_waited_for_no_longer_than_that():
    async def scenario():
        registry = Registry(timeout_s=0.05)
        registry.open.clear()
        with pytest.raises(Unavailable, match="no answer"):
            await registry.commit()
        await registry.models.close()

    asyncio.run(scenario())


@scenario
async def test_names_that_clients_make_up_push_out_nothing(registry):
    await registry.commit()
    for number in range(module.MOST_UNKNOWN + 100):
        with pytest.raises(NotFound):
            await registry.commit(Name.parse(f"made/up{number}"))
    assert len(registry.models._unknown) == module.MOST_UNKNOWN
    asked = registry.asked
    assert (await registry.commit(), registry.asked) == ("a" * 40, asked)


@scenario
async def test_there_is_a_most_of_questions(registry):
    registry.open.clear()
    for number in range(module.MOST_ASKED + 5):
        registry.models.known(Name.parse(f"made/up{number}"))
    with pytest.raises(Unavailable):
        await registry.commit()
    await asyncio.sleep(0)
    assert registry.asked == module.MOST_ASKED
    registry.open.set()
    await registry.settle()
    assert await registry.commit() == "a" * 40


@given(st.lists(st.tuples(st.sampled_from(["move", "away", "gone", "wait"]), st.integers(1, 40)), max_size=12))
def test_an_answer_is_never_older_than_it_may_be(steps):
    async def scenario():
        registry = Registry()
        history = [(0.0, "a" * 40)]
        await registry.commit()
        for number, (what, seconds) in enumerate(steps):
            if what == "wait":
                registry.now += seconds
            elif what == "move":
                history.append((registry.now, f"{number:040x}"))
                registry.says[NAME] = history[-1][1]
            else:
                registry.says[NAME] = Unavailable("away") if what == "away" else RepoNotFound("gone")
            asked = registry.asked
            try:
                answer = await registry.commit()
            except NotFound:
                assert any(step == "gone" for step, _ in steps)
                answer = None
            except Unavailable:
                assert any(step == "gone" for step, _ in steps), "what was known once is never forgotten"
                answer = None
            assert answer is None or answer in [commit for _, commit in history]
            assert registry.asked <= asked + 1
            await registry.settle()
        registry.says[NAME] = history[-1][1]
        registry.now += 100
        await asyncio.gather(registry.commit(), return_exceptions=True)
        await registry.settle()
        assert await registry.commit() == history[-1][1]
        await registry.models.close()

    asyncio.run(scenario())


def test_what_no_name_is():
    for text in ("", "a/b/c", "../x", "org/name@", "x" * 600, "org/name@..", "a b"):
        with pytest.raises(InvalidInput):
            Name.parse(text)
    assert str(Name.parse("gpt2")) == "gpt2@main"


def notice(commit: str = "", state: str = "deprecated", message: str = "old", time: int = 1, **more) -> Notice:
    return Notice(commit=commit, state=state, message=message, author="", time=time, **more)


def test_a_deprecated_model_is_told_of_in_a_header():
    commit = "a" * 40
    assert resolution(NAME, commit, []).headers == []
    assert resolution(NAME, commit, [notice("b" * 40)]).headers == [], "another commit"
    whole = resolution(NAME, commit, [notice(message='say "no"\r\nX: y', replacement="org/new")])
    assert whole.headers == [("x-helios-warning", 'org/name is deprecated: say "no"??X: y Use org/new.')]
    both = resolution(NAME, commit, [notice(time=9), notice(commit, message="this one")])
    assert both.warning == f"org/name@{commit[:12]} is deprecated: this one"
    assert both.pinned == f"org/name@{commit}"
