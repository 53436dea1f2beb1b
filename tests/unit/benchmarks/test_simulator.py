"""The simulated engine does in kind what vLLM does: all is answered, nothing stays held, what is shared is reused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.engine import BLOCK, Engine, Profile, Sequence_

SMALL = Profile(step_tokens=64, sequences=4, cache_tokens=40 * BLOCK)


def asked(own: int, prefix: int, prompt: int, output: int) -> Sequence_:
    return Sequence_(((0, prefix), (own, prompt + output)), prefix + prompt, output)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 150), st.integers(1, 60)), max_size=12))
def test_everything_is_answered_and_given_back(sizes: list[tuple[int, int, int]]) -> None:
    engine = Engine(SMALL)
    requests = [asked(number + 1, *size) for number, size in enumerate(sizes)]
    for one in requests:
        engine.submit(one)
    first, ended = [], []
    for _ in range(20_000):
        if not engine.busy:
            break
        seconds, begun, over = engine.step()
        assert seconds > 0
        assert 0 <= engine.usage <= 1
        first += begun
        ended += over
    assert not engine.busy
    assert sorted(map(id, ended)) == sorted(map(id, requests))
    assert {id(one) for one in first} == {id(one) for one in requests}
    assert all(one.made == one.output for one in requests)
    assert engine.usage == 0


def test_what_two_prompts_begin_with_is_computed_once() -> None:
    engine = Engine(SMALL)
    for own in (1, 2):
        engine.submit(one := asked(own, 10 * BLOCK, 20, 1))
        while engine.busy:
            engine.step()
        assert one.cached == (own - 1) * 10 * BLOCK
    assert engine.held(((0, 10 * BLOCK), (3, 99)), 10 * BLOCK + 99) == 10 * BLOCK


def test_a_prompt_takes_as_many_steps_as_its_tokens_take() -> None:
    engine = Engine(SMALL)
    engine.submit(asked(1, 0, 3 * 64, 2))
    steps = []
    while engine.busy:
        seconds, begun, _ = engine.step()
        steps.append((round(seconds - SMALL.step_s, 6), len(begun)))
    assert [count for _, count in steps] == [0, 0, 1, 0]
    assert steps[0][0] == round(64 * SMALL.prefill_token_s, 6)
