"""Several processes of one registry tell the same of what is fetched in the background."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest

from helios.errors import HeliosError
from helios.names import RepoId
from helios.registry_answers import Place
from tests.integration.test_pull_shared import REPO, SIZE, Site, site  # noqa: F401 - a fixture
from tests.support.mirror_site import MB, ask
from tests.support.registry import Running
from tests.support.upstream import Fault

ID = RepoId.parse(REPO)


def look(registry: Running) -> Place:
    with contextlib.closing(registry.client()) as client:
        return client.where(ID, "main")


def fetch(registry: Running) -> Place:
    with contextlib.closing(registry.client()) as client:
        return client.fetch(ID, "main")


def until(ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_other_process_tells_how_far_it_is_joins_it_and_takes_over(site: Site) -> None:  # noqa: F811
    a, b = site.start("a"), site.start("b")
    site.hub.bytes_per_s = MB
    assert fetch(a).fetch.state == "running"
    until(lambda: (now := look(b).fetch) is not None and 0 < now.done < now.total)
    joined = fetch(b).fetch
    assert (joined.state, joined.total) == ("running", SIZE + 2)
    assert joined.done > 0, "it is the fetch of the other one"
    assert len(site.hub.requests("/resolve/.*/config.json")) == 1
    assert 1 <= joined.retry_after_s <= 30
    assert ask(b.url, f"/api/v1/fetches?repo=models/{REPO}&rev=main").status == 401

    a.kill()
    until(lambda: look(b).fetch is None)
    site.hub.bytes_per_s = None
    assert fetch(b).fetch.state == "running"
    until(lambda: fetch(b).state == "here")


def test_a_failure_is_told_by_every_process_and_not_repeated_by_another_one(site: Site) -> None:  # noqa: F811
    a, b = site.start("a"), site.start("b")
    site.hub.faults.append(Fault("/api/models/", times=-1, status=403, headers={"x-error-code": "GatedRepo"}))
    fetch(a)
    until(lambda: fetch(a).fetch.state == "failed")
    asked = len(site.hub.requests("/api/models/"))
    for process in (b, a, b):
        told = fetch(process).fetch
        assert (told.state, told.error.code) == ("failed", "GatedRepo")
    assert len(site.hub.requests("/api/models/")) == asked
    with pytest.raises(HeliosError), contextlib.closing(b.client()) as client:
        client.http.json("POST", "/api/v1/fetches", params={"repo": f"models/{REPO}", "rev": "main"})
