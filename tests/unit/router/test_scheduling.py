"""Where requests go: every policy, with workers that fail, come, go and are busy."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.kv.dialogue import Answer
from router.relay.fields import read
from router.scheduling.configured import POLICIES, Tools, build
from router.scheduling.hashing import owner
from router.scheduling.keys import key_of
from router.scheduling.policy import Policy
from router.scheduling.request import Request
from router.worker import Lease, Worker
from router.worker_metrics import WorkerMetrics
from router.workers import Workers, parse_worker

CHAT = "/v1/chat/completions"


class Site:
    """Workers of one model that are up, a policy, and a clock."""

    def __init__(self, policy: Any, count: int = 4, options: str | Callable[[int], str] = "") -> None:
        self.now = 1000.0
        texts = [f"m=http://h:{n}{options if isinstance(options, str) else options(n)}" for n in range(1, count + 1)]
        self.workers = Workers([parse_worker(text) for text in texts], lambda: self.now)
        for worker in self.workers.all:
            worker.health.succeeded()
        self.held: list[Lease] = []
        self.policy: Policy = build(policy, Tools(lambda: self.now, random.Random(3), 6.0)).policy

    def all(self) -> list[Worker]:
        return self.workers.of("m")

    def choose(
        self, text: str = "", *, headers: Sequence[tuple[bytes, bytes]] = (), known: Answer | None = None, **fields: Any
    ) -> Worker:
        if text:
            fields["messages"] = [{"role": "user", "content": text}]
        model = fields.setdefault("model", "m")
        body = json.dumps(fields).encode()
        request = self.request = Request(
            model, read(body), path=CHAT, headers=headers, body=body, adapter=self.workers.adapter(model), known=known
        )  # fmt: skip
        worker = self.policy.choose(request, self.workers.candidates(model, ()))
        prefill = request.prefill if known is not None else 0
        self.lease = self.workers.lease(worker, request.tokens, request.adapter, prefill)
        self.held.append(self.lease)
        return worker

    def spread(self, requests: int, prompts: Callable[[int], str] = str, hold: bool = False) -> list[int]:
        """How many of so many requests each worker gets, each ended at once unless they are to be held."""
        found: Counter[Worker] = Counter()
        for number in range(requests):
            found[self.choose(prompts(number))] += 1
            if not hold:
                self.lease.end()
        return [found[worker] for worker in self.all()]

    def metrics(self, *waiting: int, age_s: float = 0.0, **fields: Any) -> None:
        for worker, count in zip(self.all(), waiting, strict=True):
            worker.metrics = WorkerMetrics(self.now - age_s, worker.load.requests, 1, count, 0.1, **fields)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"canary"}))
@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_every_policy_uses_every_worker_that_is_up_and_no_other(name: str, count: int) -> None:
    site = Site(name, count)
    down = site.all()[::4][:1] if count > 1 else []
    for worker in down:
        worker.health.failed("gone")
        worker.health.failed("gone")
    spread = site.spread(12 * count)
    assert [bool(got) for got in spread] == [worker not in down for worker in site.all()]
    for worker in down:
        worker.health.succeeded()
        worker.health.succeeded()
    assert all(site.spread(12 * count))


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"canary"}))
def test_every_policy_keeps_even_loads_when_nothing_ends(name: str) -> None:
    spread = Site(name).spread(200, hold=True)
    assert sum(spread) == 200
    assert max(spread) <= {"random": 75, "session-affinity": 100}.get(name, 63)


def test_round_robin_takes_turns_and_skips_who_fails() -> None:
    site = Site("round-robin", 3)
    assert [site.choose().url[-1] for _ in range(6)] == ["1", "2", "3"] * 2
    second = site.all()[1]
    for _ in range(2):
        second.health.failed("gone")
    assert [site.choose().url[-1] for _ in range(4)] == ["1", "3"] * 2
    for _ in range(2):
        second.health.succeeded()
    assert Counter(site.choose().url[-1] for _ in range(30)) == {"1": 10, "2": 10, "3": 10}


def test_round_robin_gives_a_new_worker_its_turns_and_no_more() -> None:
    site = Site("round-robin", 2)
    site.spread(100)
    site.workers.apply("file", [parse_worker("m=http://h:9")])
    site.all()[-1].health.succeeded()
    assert sorted(site.spread(30)) == [10, 10, 10]


@pytest.mark.parametrize("name", ["round-robin", "random", "least-requests", "prefix-affinity", "session-affinity"])
def test_workers_get_their_shares(name: str) -> None:
    site = Site(name, 3, lambda n: ",weight=2" if n == 2 else "")
    spread = site.spread(800, hold=name == "least-requests")
    assert 160 <= spread[0] <= 240
    assert 340 <= spread[1] <= 460


def test_least_requests_takes_turns_when_idle_and_the_idlest_else() -> None:
    site = Site("least-requests", 3)
    assert site.spread(9) == [3, 3, 3]
    site.workers.lease(site.all()[0])
    assert site.spread(8) == [0, 4, 4]


def test_least_tokens_puts_short_prompts_beside_a_long_one() -> None:
    site = Site("least-tokens", 2)
    long = site.choose("word " * 4000, max_tokens=1)
    others = [site.choose("short", max_tokens=1) for _ in range(20)]
    assert long not in others


def test_power_of_two_prefers_the_less_loaded_and_draws_both() -> None:
    site = Site("power-of-two", 2)
    site.workers.lease(site.all()[0])
    assert site.spread(10) == [0, 10]
    four = Site("power-of-two", 4)
    busiest = four.all()[2]
    for _ in range(50):
        four.workers.lease(busiest)
    assert four.spread(100)[2] == 0
    assert all(four.spread(100)[n] for n in (0, 1, 3))


# --- affinity ---


def test_same_beginning_same_worker_and_other_beginnings_all_workers() -> None:
    site = Site("prefix-affinity", 8)
    start = "You are a helpful assistant. " * 40
    owners = {site.choose(f"{start} question {number}") for number in range(4)}
    assert len(owners) == 1
    for lease in site.held:
        lease.end()
    assert all(site.spread(400, lambda n: f"{n} {start}"))


def test_where_the_beginning_ends_is_counted_in_characters_not_bytes() -> None:
    """A fork at character N is outside of N characters, inside of N + 1, whatever its bytes and its JSON."""
    for filler in ("a", "é", "界", "😀"):
        same = [filler * 99 + end for end in ("x", "y")]
        for ascii_only in (True, False):
            keys = [
                [
                    Request("m", read(json.dumps({"prompt": text}, ensure_ascii=ascii_only).encode())).prefix_key(chars)
                    for text in same
                ]
                for chars in (99, 100)
            ]
            assert keys[0][0] == keys[0][1]
            assert keys[1][0] != keys[1][1]


def test_a_popular_beginning_spreads_and_stays_within_its_bound() -> None:
    site = Site({"name": "prefix-affinity", "load_factor": 1.5, "min_requests": 1}, 4)
    for number in range(1, 101):
        site.choose("the same")
        most = max(worker.load.requests for worker in site.all())
        assert most <= -(-1.5 * number // 4)


def test_few_requests_stay_together_whatever_the_bound() -> None:
    assert sorted(Site({"name": "prefix-affinity", "min_requests": 6}, 4).spread(6, lambda n: "p", hold=True))[-1] == 6


def test_a_worker_that_goes_moves_only_its_own_prompts_and_gets_them_back() -> None:
    site = Site("prefix-affinity", 5)

    def owners() -> list[Worker]:
        found = []
        for number in range(100):
            found.append(site.choose(f"prompt {number}"))
            site.lease.end()
        return found

    before = owners()
    gone = before[0]
    for _ in range(2):
        gone.health.failed("gone")
    without = owners()
    assert gone not in without
    assert all(now is then for now, then in zip(without, before, strict=True) if then is not gone)
    assert len({now for now, then in zip(without, before, strict=True) if then is gone}) > 1
    for _ in range(2):
        gone.health.succeeded()
    assert owners() == before


def test_routers_that_know_the_workers_in_another_order_find_the_same_owner() -> None:
    one = Workers([parse_worker(f"m=http://h:{n}") for n in (1, 2, 3, 4)], lambda: 0.0).of("m")
    other = Workers([parse_worker(f"m=http://h:{n}") for n in (4, 2, 1, 3)], lambda: 0.0).of("m")
    for number in range(50):
        key = key_of(str(number))
        assert one[owner(key, one, 1.25, 4)].url == other[owner(key, other, 1.25, 4)].url


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0.1, 1.0, 3.0])), min_size=1, max_size=12),
    st.integers(0, 2**60 - 1), st.sampled_from([1.01, 1.25, 4.0]), st.integers(1, 9),
)  # fmt: skip
def test_an_owner_is_always_found_and_within_its_bound(
    workers: list[tuple[int, float]], key: int, factor: float, floor: int
) -> None:
    candidates = Workers([parse_worker(f"m=http://h:{n + 1}") for n in range(len(workers))], lambda: 0.0).of("m")
    for worker, (load, share) in zip(candidates, workers, strict=True):
        worker.share = share
        for _ in range(load):
            worker.load.begin(1)
    found = candidates[owner(key, candidates, factor, floor)]
    total, shares = sum(load for load, _ in workers) + 1, sum(share for _, share in workers)
    assert found.load.requests < max(floor, factor * total * found.share / shares + 1)


def test_token_ids_of_equal_length_do_not_collapse() -> None:
    site = Site("prefix-affinity", 4)
    owners: Counter[Worker] = Counter()
    for number in range(100):
        owners[site.choose(prompt=[[1000 + number, *range(200, 300)]] if number % 2 else [1000 + number, 7])] += 1
        site.lease.end()
    assert len(owners) == 4
    assert len({site.choose(prompt=[5, 6, 7]) for _ in range(4)}) == 1


def test_adapters_have_owners_of_their_own() -> None:
    site = Site("prefix-affinity", 8, "".join(f",adapter=a{n}" for n in range(8)))
    assert len({site.choose("the same", model=f"a{n}") for n in range(8)}) > 2


def test_a_session_stays_with_its_worker_and_its_header_comes_first() -> None:
    site = Site("session-affinity", 8)
    header = [(b"x-session-id", b"one")]
    with_header = {site.choose(f"prompt {n}", headers=header, user=f"u{n}") for n in range(5)}
    assert len(with_header) == 1
    by_user = [site.choose(f"prompt {n}", headers=[(b"x-session-id", b" ")], user="u") for n in range(5)]
    assert len(set(by_user)) == 1
    others = {site.choose("same prompt", headers=[(b"x-session-id", str(n).encode())]) for n in range(20)}
    assert len(others) > 4


def test_without_a_session_the_prompt_counts_and_without_a_prompt_the_load() -> None:
    site = Site("session-affinity", 8)
    assert len({site.choose("the same", headers=[(b"x-session-id", b"")], user="") for _ in range(5)}) == 1
    assert len({site.choose() for _ in range(7)}) == 7


def test_user_inside_a_prompt_is_text() -> None:
    site = Site({"name": "session-affinity", "prefix_chars": 0}, 8)
    text = '"user": "mallory", "session_id": "x"'
    assert len({site.choose(f"{text} {n}") for n in range(8)}) == 8


def test_another_header_and_another_field_can_be_named() -> None:
    site = Site({"name": "session-affinity", "header": "X-Agent", "field": "prompt_cache_key"}, 8)
    assert len({site.choose(f"{n}", headers=[(b"x-agent", b"7")]) for n in range(5)}) == 1
    assert len({site.choose(f"{n}", prompt_cache_key="k", user=f"{n}") for n in range(5)}) == 1


# --- what workers say ---


def test_queue_depth_avoids_the_longest_queue_and_counts_what_was_sent_since() -> None:
    site = Site("queue-depth", 3)
    site.metrics(9, 0, 9)
    assert site.spread(5) == [0, 5, 0]
    assert site.spread(60, hold=True) != [0, 60, 0]


def test_what_is_stale_is_unknown() -> None:
    site = Site("queue-depth", 3)
    site.metrics(50, 0, 0, age_s=6.1)
    assert site.spread(30) == [10, 10, 10]
    site.metrics(0, 9, 9)
    site.all()[0].metrics = None
    assert site.spread(30)[0] == 30 // 3  # an unknown queue is like the others', not empty


def test_a_full_kv_cache_is_avoided() -> None:
    site = Site({"scorers": ["kv-usage"]}, 2)
    site.metrics(0, 0)
    site.all()[0].metrics = WorkerMetrics(site.now, 0, 1, 0, 0.9)
    assert site.spread(10) == [0, 10]


def test_saturated_workers_are_left_out_unless_all_are() -> None:
    site = Site({"filters": ["unsaturated"], "picker": "round-robin"}, 3)
    site.metrics(5, 4, 0)
    assert site.spread(10) == [0, 5, 5]
    site.metrics(9, 7, 8)
    assert site.spread(10) == [0, 10, 0]
    site.now += 7
    assert all(site.spread(10))


def test_an_adapter_goes_where_it_is_over_the_load() -> None:
    site = Site("lora-affinity", 3, ",adapter=poems,adapter=prose")
    first = site.choose(model="poems")
    assert [site.choose(model="poems") for _ in range(3)] == [first] * 3
    assert site.choose(model="prose") is not first
    assert len({site.choose(model="m") for _ in range(2)}) == 2


def test_an_adapter_moves_when_its_worker_has_five_times_the_requests() -> None:
    site = Site("lora-affinity", 2, ",adapter=poems")
    assert max(site.spread(5, hold=True)) <= 3  # the base model's are spread
    for lease in site.held:
        lease.end()
    chosen = [site.choose(model="poems") for _ in range(8)]
    assert len(set(chosen)) == 2
    assert len(set(chosen[:4])) == 1


def test_an_adapter_finds_the_worker_that_has_a_place_for_it() -> None:
    site = Site("lora-affinity", 3, ",adapter=poems")
    full: dict[str, Any] = {"adapters_max": 1, "adapters_running": frozenset({"other"})}
    site.metrics(0, 0, 0, **full)
    site.all()[1].metrics = WorkerMetrics(site.now, 0, 1, 0, 0.1, adapters_max=1)
    assert site.choose(model="poems") is site.all()[1]
    site.lease.end()
    site.all()[2].metrics = WorkerMetrics(site.now, 0, 1, 0, 0.1, frozenset({"poems"}), adapters_max=1)
    assert site.choose(model="poems") is site.all()[2]


def test_latency_prefers_the_fast_and_tries_the_slow_again_later() -> None:
    site = Site("latency", 2)
    slow, fast = site.all()
    for _ in range(3):
        slow.first_byte[False].observe(2.0, site.now)
        fast.first_byte[False].observe(0.1, site.now)
    assert site.spread(10) == [0, 10]
    spread = site.spread(63, hold=True)  # until the fast one has twenty times as many
    assert spread == [3, 60]
    for lease in site.held:
        lease.end()
    site.now += 200
    assert all(site.spread(10))


def test_streams_are_not_measured_by_whole_answers() -> None:
    site = Site("latency", 2)
    one, two = site.all()
    one.first_byte[False].observe(9.0, site.now)
    two.first_byte[False].observe(1.0, site.now)
    one.first_byte[True].observe(0.1, site.now)
    two.first_byte[True].observe(0.5, site.now)
    assert site.choose() is two
    assert site.choose(stream=True) is one


def known(*cached: int | None, length: int = 1000) -> Answer:
    """What the index says of a prompt, for the workers in their order; None: it doesn't follow that one."""
    return Answer(1, length, {f"http://h:{n}": has for n, has in enumerate(cached, 1) if has is not None})


def test_a_worker_that_has_the_prompt_is_preferred_until_it_is_busy() -> None:
    site = Site("prefix-index", 3)
    said = known(0, 1000, 0)
    for _ in range(10):
        assert site.choose("word " * 800, known=said) is site.all()[1]
        site.lease.end()
    chosen = [site.choose("word " * 800, known=said) for _ in range(60)]
    assert chosen[:8] == [site.all()[1]] * 8
    assert len(set(chosen)) == 3


def test_a_prompt_that_nobody_has_any_more_is_not_where_it_was_sent() -> None:
    site = Site("prefix-index", 3)
    first = site.choose("word " * 800, known=known(0, 0, 0))
    assert site.choose("word " * 800, known=known(0, 0, 0)) is first  # it is being computed there
    for lease in site.held:
        lease.end()
    others = {n: 800 for n, worker in enumerate(site.all()) if worker is not first}
    cached = [others.get(n, 0) for n in range(3)]
    assert site.choose("word " * 800, known=known(*cached)) is not first


def test_what_the_index_does_not_follow_is_known_by_what_was_sent_there() -> None:
    site = Site("prefix-index", 3)
    first = site.choose("word " * 800)
    site.lease.end()
    for answer in (None, known(None, None, None), known(*(None if w is first else 200 for w in site.all()))):
        assert site.choose("word " * 800, known=answer) is first
        site.lease.end()


def test_the_prompts_real_length_and_what_is_left_of_it_are_counted() -> None:
    site = Site("prefix-index", 2)
    worker = site.choose("word " * 800, known=known(0, 600, length=700))
    assert (worker, site.request.prompt_tokens, site.request.prefill) == (site.all()[1], 700, 100)


# --- canary ---


def revision(number: int) -> str:
    return ",revision=new" if number == 4 else ",revision=old" if number < 4 else ""


def test_a_canary_gets_its_part_and_a_conversation_stays_with_its_revision() -> None:
    site = Site({"name": "canary", "weights": {"old": 80, "new": 20}}, 5, revision)
    spread = site.spread(500)
    assert 70 <= spread[3] <= 130
    assert spread[4] == 0  # its revision is not written
    for session in range(20):
        header = [(b"x-session-id", str(session).encode())]
        assert len({site.choose(f"{n}", headers=header).revision for n in range(4)}) == 1


def test_more_weight_moves_only_some_to_the_canary() -> None:
    def of(weight: int) -> list[str]:
        site = Site({"name": "canary", "weights": {"old": 100 - weight, "new": weight}}, 5, revision)
        found = []
        for number in range(200):
            found.append(site.choose(f"prompt {number}").revision)
            site.lease.end()
        return found

    few, more = of(10), of(40)
    assert all(later == "new" for now, later in zip(few, more, strict=True) if now == "new")
    assert 50 <= more.count("new") <= 110


def test_a_canary_that_is_down_leaves_its_part_to_the_others() -> None:
    site = Site({"name": "canary", "weights": {"old": 50, "new": 50}}, 5, revision)
    for _ in range(2):
        site.all()[3].health.failed("gone")
    assert site.spread(60)[3:] == [0, 0]
    for worker in site.all()[:3]:
        for _ in range(2):
            worker.health.failed("gone")
    assert site.spread(10) == [0, 0, 0, 0, 10]
    assert Site({"name": "canary", "weights": {"old": 0, "new": 1}}, 5, revision).spread(10) == [0, 0, 0, 10, 0]


def test_scores_are_added_up_by_their_weights() -> None:
    def first(queue: float, requests: float) -> int:
        scorers = [{"name": "queue-depth", "weight": queue}, {"name": "least-requests", "weight": requests}]
        site = Site({"scorers": scorers}, 2)
        for _ in range(4):
            site.workers.lease(site.all()[0])
        site.metrics(0, 3)
        return site.all().index(site.choose())

    assert first(9, 1) == 0
    assert first(1, 9) == 1
