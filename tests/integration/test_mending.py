"""A stored chunk that is damaged or lost is fetched again behind the reader who found it; nothing wrong is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from heliosfs.store.recipe import Recipe
from tests.support.damage import flip
from tests.support.mirror_site import Answer, Site, own_site, sha, weights
from tests.support.postgres import Databases
from tests.support.upstream import Fault, Upstream

pytestmark = pytest.mark.both_databases

MIB = 1 << 20
FILES = {"config.json": b"{}", "model.safetensors": weights(21 * MIB)}
MODEL = FILES["model.safetensors"]
DAMAGED = f"a chunk in the store is damaged.*{sha(MODEL)}"
DEEP = range(10 * MIB, 10 * MIB + 100)


@pytest.fixture
def opened(tmp_path: Path, databases: Databases) -> Iterator[tuple[Upstream, Callable[..., Site]]]:
    with own_site(tmp_path, 0, databases) as found:
        yield found


def pulled(site: Site) -> Path:
    """Have the registry hold the model; returns the object that is its weights."""
    commit = site.commit()
    assert site.get("config.json").body == b"{}"
    assert site.get("model.safetensors").body == MODEL
    until(lambda: site.held() == {"main": commit})
    with site.hub.lock:
        site.hub.seen = []
    return weights_of(site)


def weights_of(site: Site) -> Path:
    """The object that is the model's weights, to be damaged."""
    site.registry.expect_errors(DAMAGED)
    home = Path(site.helios.env["HELIOS_HOME"])
    (found,) = (home / "store/public/blobs").rglob(sha(MODEL))
    return found


def until(ready: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)


def part(site: Site, wanted: range = DEEP) -> Answer:
    """A range of the weights: right, or refused with the reason."""
    answer = site.get("model.safetensors", range=f"bytes={wanted[0]}-{wanted[-1]}")
    if answer.status == 206:
        assert answer.body == MODEL[wanted[0] : wanted[-1] + 1]
    else:
        assert (answer.status, answer.code) == (502, "Integrity")
    return answer


def reason(site: Site) -> str:
    """Why it is not repaired, once that is known."""
    until(lambda: "no other source gave it" in part(site).headers["x-error-message"])
    return part(site).headers["x-error-message"]


def test_a_damaged_chunk_is_fetched_again_once_and_the_next_reader_gets_it(opened) -> None:
    hub, open_ = opened
    site = open_(files=FILES)
    damaged = pulled(site)
    for at in (DEEP[0], 17 * MIB):
        flip(damaged, at)
    hub.bytes_per_s = 4 * MIB
    answers: list[Answer] = []
    readers = [threading.Thread(target=lambda: answers.append(part(site))) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert {answer.status for answer in answers} == {502}
    assert "try again in a moment" in answers[0].headers["x-error-message"]
    until(lambda: part(site).status == 206)
    until(lambda: len(hub.requests("/repos/")) == 2)
    assert hub.sent("/repos/") < 9 * MIB, "two chunks, once each"
    until(lambda: part(site, range(17 * MIB, 17 * MIB + 9)).status == 206)
    assert site.get("model.safetensors").body == MODEL


def test_a_lost_object_comes_back_whole(opened) -> None:
    _, open_ = opened
    site = open_(files=FILES)
    pulled(site).unlink()
    assert part(site).status == 502
    until(lambda: part(site).status == 206)
    until(lambda: site.get("model.safetensors").body == MODEL)


def test_a_node_that_doubts_a_chunk_hears_where_the_right_one_is(opened) -> None:
    _, open_ = opened
    site = open_(files=FILES)
    flip(pulled(site), DEEP[0])
    name = f"repo=models/{site.repo}&blob={sha(MODEL)}"
    number = Recipe.decode(site.native(f"recipe?{name}").body).locate(DEEP[0])
    before = msgspec.json.decode(site.native(f"placements?{name}").body)
    after = msgspec.json.decode(site.native(f"placements?{name}&doubt={number}").body)
    assert after["version"] > before["version"]
    assert len(after["objects"]) == len(before["objects"]) + 1
    assert part(site).status == 206


def test_a_blob_that_no_commit_holds_yet_is_repaired_too(opened) -> None:
    _, open_ = opened
    site = open_(files=FILES)
    site.commit()
    assert site.get("model.safetensors").body == MODEL
    until(lambda: list((Path(site.helios.env["HELIOS_HOME"]) / "store/public/blobs").rglob(sha(MODEL))))
    until(lambda: part(site).status == 206)
    flip(weights_of(site), DEEP[0])
    assert part(site).status == 502
    until(lambda: part(site).status == 206)
    assert site.held() == {}


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (Fault("/repos/", times=-1, flip_at=DEEP[0] + 1), "other bytes"),
        (Fault("/resolve/", times=-1, status=403, headers={"x-error-code": "GatedRepo"}), "is gated"),
    ],
    ids=["wrong bytes", "refused"],
)
def test_what_the_upstream_does_not_give_stays_damaged_and_the_error_says_what_to_do(opened, fault, why) -> None:
    hub, open_ = opened
    site = open_(files=FILES)
    flip(pulled(site), DEEP[0])
    hub.faults.append(fault)
    told = reason(site)
    assert why in told
    assert "`helios store verify --repair`" in told
    asked = len(hub.requests("/resolve/"))
    for _ in range(3):
        assert part(site).status == 502
    assert len(hub.requests("/resolve/")) == asked, "not asked again at once"
    assert part(site, range(100)).status == 206, "what is whole is served"


@pytest.mark.one_database
def test_offline_the_error_says_so(opened) -> None:
    hub, open_ = opened
    site = open_(files=FILES)
    flip(pulled(site), DEEP[0])
    site.registry.kill()
    site = open_(files=FILES, HELIOS_REGISTRY__OFFLINE="true")
    site.registry.expect_errors(DAMAGED)
    assert "the registry is offline" in reason(site)
    assert hub.requests("/resolve/") == []
