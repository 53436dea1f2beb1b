"""Which pairs are warm, and when others are tried."""

from __future__ import annotations

from collections.abc import Sequence

from router.disaggregation.pairs import FIRST_PAUSE_S, LONGEST_PAUSE_S, Pairs
from router.worker import Worker
from router.workers import Workers, parse_worker

TEXTS = ("m=http://p:1,role=prefill", "m=http://q:1,role=prefill", "m=http://d:1,role=decode", "m=http://b:1")


class Site:
    def __init__(self, texts: Sequence[str] = TEXTS) -> None:
        self.now = 100.0
        self.workers = Workers([parse_worker(text) for text in texts], lambda: self.now)
        self.pairs = Pairs(lambda: self.now)
        for worker in self.workers.all:
            self.up(worker)

    def up(self, worker: Worker) -> None:
        if worker.health.succeeded():
            worker.begins_anew()

    def at(self, host: str) -> Worker:
        worker = self.workers.at(f"http://{host}:1")
        assert worker is not None
        return worker

    def due(self) -> list[str]:
        found = self.pairs.due(self.workers)
        return sorted(f"{prefill.address.host}{decode.address.host}" for prefill, decode, _ in found)


def test_each_pair_is_asked_for_once_until_it_is_warm() -> None:
    site = Site()
    assert site.due() == ["pd", "qd"]
    assert site.due() == []
    assert not site.pairs.warm(site.at("p"), site.at("d"))
    site.pairs.done(site.at("p"), site.at("d"))
    site.pairs.failed(site.at("q"), site.at("d"))
    assert site.pairs.warm(site.at("p"), site.at("d"))
    assert not site.pairs.warm(site.at("q"), site.at("d"))
    assert site.due() == []
    assert site.pairs.count == 1
    site.now += FIRST_PAUSE_S
    assert site.due() == ["qd"]


def test_pauses_grow_and_have_an_end() -> None:
    site = Site()
    site.due()
    pauses = []
    for _ in range(10):
        site.pairs.failed(site.at("p"), site.at("d"))
        since = site.now
        while "pd" not in site.due():
            site.now += 0.5
        pauses.append(site.now - since)
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (FIRST_PAUSE_S, LONGEST_PAUSE_S)


def test_a_worker_that_was_started_anew_is_cold() -> None:
    site = Site()
    site.due()
    site.pairs.done(site.at("p"), site.at("d"))
    while not site.at("p").health.failed("gone"):
        pass
    assert site.due() == []
    assert site.pairs.count == 0
    while not site.at("p").up:
        site.up(site.at("p"))
    assert not site.pairs.warm(site.at("p"), site.at("d"))
    assert site.due() == ["pd"]
    assert site.pairs.count == 0


def test_only_workers_of_one_revision_are_a_pair() -> None:
    texts = ("m=http://p:1,role=prefill,revision=a", "m=http://q:1,role=prefill,revision=b")
    assert Site((*texts, "m=http://d:1,role=decode,revision=b")).due() == ["qd"]


def test_what_is_gone_is_forgotten() -> None:
    site = Site()
    site.due()
    site.pairs.done(site.at("p"), site.at("d"))
    site.workers.apply("configuration", [])
    site.due()
    assert len(site.pairs._pairs) == 1, "that of the one that is still being asked"
