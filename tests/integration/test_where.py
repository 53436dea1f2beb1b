"""``helios where`` and ``/api/v1/where``: at which level a model is, and having one fetched that is only upstream."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from helios.errors import HeliosError
from helios.names import RepoId
from registry.levels import fetches as fetches_module
from registry.levels.fetches import Fetches
from registry.pull.pulls import Pull
from registry.threads import LOOKUPS
from tests.support.hub_site import write
from tests.support.mirror_site import MB, Site, fresh_files, fresh_name, own_site, renewed, shared_site
from tests.support.postgres import Databases
from tests.support.upstream import Fault

pytestmark = pytest.mark.both_databases


@pytest.fixture(scope="module")
def shared(tmp_path_factory, databases):
    with shared_site(tmp_path_factory.mktemp("mirror"), **databases()) as found:
        yield found


@pytest.fixture
def site(shared):
    with renewed(shared, fresh_files()) as found:
        yield found


def look(site: Site, rev: str = "main") -> dict:
    answer = site.native(f"where?repo=models/{site.repo}&rev={rev}")
    assert answer.status == 200, answer
    return json.loads(answer.body)


def fetch(site: Site, rev: str = "main", status: int | None = None) -> dict:
    parts = urlsplit(site.registry.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        body = json.dumps({"repo": f"models/{site.repo}", "rev": rev})
        connection.request("POST", "/api/v1/where", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        assert status is None or answer.status == status, found
        if answer.status == 202:
            assert int(answer.headers["retry-after"]) == found["fetch"]["retry_after_s"] >= 1
        return found
    finally:
        connection.close()


def until(ready, timeout_s: float = 20.0):
    end = time.monotonic() + timeout_s
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_what_is_only_upstream_is_told_and_nothing_is_fetched(site: Site) -> None:
    commit = site.commit()
    found = look(site)
    assert (found["state"], found["commit"], found["fetch"]) == ("upstream", commit, None)
    assert found["bytes"] == sum(map(len, site.files.values()))
    assert site.hub.requests("/resolve/") == []
    assert site.native(f"refs?repo=models/{site.repo}").status == 404, "and nothing is followed from then on"
    assert site.helios.both("where", f"{site.repo}@main")[0].startswith(
        f"{site.repo}@main is at the upstream only: commit {commit}, 3.0 MB\n"
    )


def test_asking_for_it_starts_its_download_in_the_background_and_tells_how_far_that_is(site: Site) -> None:
    commit = site.commit()
    site.hub.bytes_per_s = 3 * MB
    found = fetch(site, status=202)
    assert (found["state"], found["fetch"]["state"]) == ("unknown", "running"), "the upstream is not waited for"
    seen = until(lambda: (now := look(site))["fetch"] and 0 < now["fetch"]["done"] < now["fetch"]["total"] and now)
    assert seen["fetch"]["total"] == sum(map(len, site.files.values()))
    again = fetch(site, status=202)
    assert again["fetch"]["done"] >= seen["fetch"]["done"], "joined, not begun anew"
    out, _ = site.helios.both("where", site.repo)
    assert "It is being fetched:" in out
    assert "of 3.0 MB (" in out
    found = until(lambda: (now := fetch(site))["state"] == "here" and now)
    assert (found["commit"], found["fetch"]) == (commit, None)
    assert found["held"] == found["bytes"] == sum(map(len, site.files.values()))
    assert site.held() == {"main": commit}
    assert len(site.hub.requests(r"/resolve/.*/config.json")) == 1, "fetched once"
    out, _ = site.helios.both("where", site.repo)
    lines = out.splitlines()
    assert lines[0] == f"{site.repo}@main is here: commit {commit}, 3.0 MB"
    rows = [line.split() for line in lines[2:]]
    assert [rows[0], rows[2]] == [["LEVEL", "BYTES", "SHARE"], ["store", "3.0", "MB", "100%"]]
    assert rows[1][0] == "memory"


def test_a_failure_is_told_with_its_reason_and_not_repeated_at_once(site: Site) -> None:
    site.commit()
    site.hub.faults.append(Fault("/api/models/", times=-1, status=403, headers={"x-error-code": "GatedRepo"}))
    fetch(site)
    found = until(lambda: (now := fetch(site))["fetch"]["state"] == "failed" and now)
    assert found["fetch"]["error"]["code"] == "GatedRepo"
    assert 1 <= found["fetch"]["retry_after_s"] <= 30
    asked = len(site.hub.requests("/api/models/"))
    for _ in range(3):
        assert fetch(site, status=200)["fetch"]["state"] == "failed"
    assert len(site.hub.requests("/api/models/")) == asked
    out, err = site.helios.both("where", "--fetch", site.repo, code=1)
    assert "helios: fetching it failed: main at " not in out
    assert "is gated" in err


def test_what_nobody_has_is_a_clear_no(site: Site) -> None:
    found = look(site)
    assert (found["state"], found["levels"]) == ("nowhere", None)
    assert site.repo in found["reason"]
    no = until(lambda: (now := fetch(site))["state"] == "nowhere" and now)
    assert (no["fetch"], site.repo in no["reason"]) == (None, True), "a clear no is no failure"
    assert (look(site)["state"], look(site)["fetch"]) == ("nowhere", None)
    asked = len(site.hub.requests(site.repo))
    assert fetch(site, status=200)["state"] == "nowhere"
    assert len(site.hub.requests(site.repo)) == asked, "and the upstream is not asked again at once"
    out, err = site.helios.both("where", site.repo, code=1)
    assert out == ""
    assert err.startswith(f"helios: {site.repo}@main is nowhere: there is no {site.repo}")
    ours = fresh_name("ours")
    _, err = site.helios.both("where", "--fetch", ours, code=1)
    assert "a rule says that the upstream is not asked" in err
    assert site.hub.requests(ours) == []
    site.hub.faults.append(Fault("/api/models/", times=-1, status=503))
    found = look(replace(site, repo=fresh_name()))
    assert found["state"] == "unknown", "an upstream that is down is no no"
    assert "503" in found["reason"]


def test_everything_at_a_glance(tmp_path: Path, databases: Databases) -> None:
    with own_site(tmp_path, 2 * MB, databases) as (_, open_):
        site = open_()
        assert "The registry is empty" in site.helios.both("where")[1]
        site.helios("push", str(write(tmp_path / "m", {"a": bytes(1000)})), "org/own")
        site.commit()
        assert site.get("config.json").status == 200
        # The small file alone is here; the listing says what is not.
        until(lambda: json.loads(site.native("where").body)["models"][0]["state"] == "partial")
        out, _ = site.helios.both("where")
        rows = [line.split() for line in out.splitlines()]
        assert rows[0] == ["MODEL", "STATE", "SIZE", "MEMORY", "STORE"]
        commit = site.hub.repos["models/org/m"].refs["main"]
        assert rows[1][:4] == [f"org/m@{commit[:12]}", "partial", "2.0", "MB"]
        assert [word for word in rows[2] if word != "names"] == ["org/own", "here", "1.0", "kB", "100%"]
        found = look(site)
        assert found["state"] == "partial"
        assert found["held"] == len(site.files["config.json"])
        found = json.loads(site.helios("where", "--json"))
        assert [row["repo"] for row in found["models"]] == ["models/org/m", "models/org/own"]
        assert site.helios.both("where", "--fetch", code=2)[1].endswith("--fetch needs a model\n")


@pytest.fixture
def held_back(site: Site) -> Iterator[threading.Event]:
    """An upstream that answers nothing about models of ``held`` until the event is set."""
    answer = threading.Event()
    site.hub.faults.append(Fault("/api/models/held/", times=-1, then=lambda: answer.wait(60)))
    yield answer
    answer.set()


def test_an_upstream_that_is_slow_keeps_nobody_from_what_is_here(
    site: Site, tmp_path: Path, held_back: threading.Event
) -> None:
    site.helios("push", str(write(tmp_path / "m", {"a": b"here"})), site.repo)
    names = [fresh_name("held") for _ in range(LOOKUPS + 8)]
    for name in names[:3]:
        site.hub.commit(name, site.files)
    asked = [names[0]] * 4 + names
    answers: list[dict] = []

    def where(name: str) -> None:
        answers.append(look(replace(site, repo=name)))

    with ThreadPoolExecutor(len(asked)) as threads:
        askers = [threads.submit(where, name) for name in asked]
        until(lambda: len(site.hub.requests("/api/models/held/")) >= 6)
        assert site.get("a").body == b"here"
        assert answers == [], "they wait, and nobody waits for them"
        held_back.set()
        for asker in askers:
            asker.result()
    states = {answer["repo"].removeprefix("models/"): answer["state"] for answer in answers}
    assert states == dict.fromkeys(names[:3], "upstream") | dict.fromkeys(names[3:], "nowhere")
    assert len(site.hub.requests(f"/api/models/{names[0]}/")) == 1, "who asks the same shares the answer"
    assert look(replace(site, repo=names[-1]))["state"] == "nowhere"
    assert len(site.hub.requests(f"/api/models/{names[-1]}/")) == 1, "a refusal is remembered for a while"


def test_an_upstream_that_does_not_answer_is_given_up(site: Site, held_back: threading.Event) -> None:
    site.repo = fresh_name("held")
    found = look(site)
    assert (found["state"], held_back.is_set()) == ("unknown", False)
    assert "no answer within 8 s" in found["reason"]


def test_bad_questions(site: Site) -> None:
    for query in ("repo=", "repo=../x", "repo=models/a/b/c", f"repo=models/{site.repo}&rev=", "repo=a&rev=%00"):
        assert site.native(f"where?{query}").status == 400
    site.repo = "../x"
    fetch(site, status=400)


class _Pulls:
    """Pulls that end when they are told to."""

    def __init__(self) -> None:
        self.started: list[Pull] = []

    def start(self, repo: RepoId, revision: str) -> Pull:
        self.started.append(Pull(repo, revision))
        return self.started[-1]


@pytest.mark.one_database
def test_fetches_are_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    pulls = _Pulls()
    fetches = Fetches(pulls, lambda: now)  # type: ignore[arg-type]
    repos = [RepoId.parse(f"org/m{number}") for number in range(fetches_module.MOST + 1)]
    for repo in repos[:-1]:
        fetches.start(repo, "main")
        assert fetches.start(repo, "main").pull is pulls.started[-1], "joined"
    with pytest.raises(HeliosError, match="are being fetched already"):
        fetches.start(repos[-1], "main")
    pull = pulls.started[0]
    pull.progress.file("a", 100)
    pull.progress.done("a", 20)
    now = 10.0
    assert fetches.retry_after_s(fetches.find(repos[0], "main")) == 30  # type: ignore[arg-type]
    pull.progress.done("a", 80)
    assert fetches.retry_after_s(fetches.find(repos[0], "main")) == 2, "20 of 100 in as long as 80 took, by 4"  # type: ignore[arg-type]
    pull.error = HeliosError("broken")
    pull.finished.set()
    assert fetches.start(repos[0], "main").pull is pull, "failed just now"
    fetches.start(repos[-1], "main")
    now += fetches_module.AGAIN_S
    with pytest.raises(HeliosError, match="are being fetched already"):
        fetches.start(repos[0], "main")
    pulls.started[1].finished.set()
    assert fetches.start(repos[0], "main").pull is not pull
    assert fetches.find(repos[1], "main") is not None
    now += fetches_module.KEEP_S + 1
    assert fetches.find(repos[1], "main") is None
