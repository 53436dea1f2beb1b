"""``helios push`` to a registry far away: what goes over the wire, and what happens when that breaks."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
import pytest

from helios.errors import Conflict, HeliosError, InvalidInput, Unavailable
from helios.home import Home
from helios.names import RepoId
from helios.publish import LocalFile, OpenPush, publish
from helios.registry_answers import Offered, Pushed, StartedPush
from helios.registry_client import RegistryClient
from heliosfs.store import batch, sending
from heliosfs.store.cutting import recipe_of
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import commit_key, manifest_key, recipe_key
from heliosfs.store.manifest import Manifest
from heliosfs.store.sending import ByChunks
from registry.catalog import Catalog
from tests.support.ingest import safetensors, seeded
from tests.support.postgres import metadata_of
from tests.support.registry import Running, running_registry
from tests.support.slow_link import SlowLink
from tests.support.terminal import on_a_terminal

pytestmark = pytest.mark.both_databases

MIB = 1 << 20
TENSORS = {f"t{number}": seeded(2 * MIB, number) for number in range(8)}
BASE, TUNED = RepoId.parse("org/base"), RepoId.parse("org/tuned")
ROOM = 40_000
"""Bytes of requests' heads, recipes and small files that a push of one of these models may take."""


def model(directory: Path, changed: int | None = None, *, seed: int = 99, **more: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = TENSORS if changed is None else TENSORS | {f"t{changed}": seeded(2 * MIB, seed)}
    (directory / "model.safetensors").write_bytes(safetensors(tensors))
    (directory / "config.json").write_text("{}")
    for name, content in more.items():
        (directory / f"{name}.dat").write_bytes(content)
    return directory


def check_whole(home: Home, settings: Mapping[str, str]) -> set[str]:
    """Every commit reads back whole, and nothing else is stored; returns the repositories."""
    database = metadata_of(home, settings)
    with contextlib.closing(database), DirectoryStore(home.store) as store:
        catalog = Catalog(database, store)
        needed = set()
        for info in catalog.repos():
            for commit in info.refs.values():
                manifest = catalog.contents.manifest(info.repo, commit)
                needed |= {commit_key("public", info.repo, commit), manifest_key("public", manifest.digest)}
                for entry in manifest.files.values():
                    catalog.contents.blob_reader(info.repo, entry.sha256).verify()
                    needed.add(recipe_key("public", entry.recipe))
                    placement = catalog.contents.placement(info.repo, entry.sha256)
                    needed |= {each.key for each in placement.objects}
        assert {info.key for info in store.list("public/") if "/registry/" not in info.key} == needed
        return {info.repo.id for info in catalog.repos()}


@pytest.fixture
def registry(helios: Any) -> Iterator[Running]:
    with running_registry(helios) as found:
        yield found


@pytest.fixture
def link(registry: Running) -> Iterator[SlowLink]:
    parts = urlsplit(registry.url)
    with SlowLink(parts.hostname or "", parts.port or 0, None) as found:
        yield found


@pytest.fixture
def client(registry: Running, link: SlowLink) -> Iterator[RegistryClient]:
    """Over the link; its pauses are short."""
    with contextlib.closing(registry.client(link.url)) as found:
        yield found


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PAUSE_S", 0.05)
    monkeypatch.setattr(batch, "MAX_BATCH", 4 * MIB)


def push(client: RegistryClient, directory: Path, repo: RepoId) -> Pushed:
    return publish(client, directory, repo, "main", sender=ByChunks())


def check(client: RegistryClient, directory: Path, repo: RepoId, pushed: Pushed) -> None:
    """The commit holds the directory's files, as a registry that was sent them whole has them."""
    at = client.resolve(repo, "main")
    assert at.commit == pushed.commit
    files = Manifest.decode(client.manifest(repo, at.commit), at.manifest).files
    local = {path.name: path for path in directory.iterdir()}
    assert files.keys() == local.keys()
    for name, path in local.items():
        assert files[name].sha256 == recipe_of(path, name, path.stat().st_size).blob


def test_only_the_changed_tensor_goes_over_the_wire(client: RegistryClient, link: SlowLink, tmp_path: Path) -> None:
    base, tuned = model(tmp_path / "base"), model(tmp_path / "tuned", 3)
    size = (base / "model.safetensors").stat().st_size
    first = push(client, base, BASE)
    assert size <= first.sent_bytes <= link.sent <= size + ROOM
    before = link.sent
    second = push(client, tuned, TUNED)
    assert 2 * MIB <= second.sent_bytes <= link.sent - before <= 2 * MIB + ROOM
    assert (second.new_bytes, second.logical_bytes) == (2 * MIB, size + 2)
    check(client, tuned, TUNED, second)
    for repo in (TUNED, RepoId.parse("org/again")):
        before = link.sent
        again = push(client, tuned, repo)
        assert again.sent_bytes <= link.sent - before <= ROOM
        assert again.new_bytes == 0
        check(client, tuned, repo, again)


@pytest.fixture(params=["reading first", "asking first"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the models count as large, so that a few of their chunks are asked about before they are read."""
    if request.param == "asking first":
        monkeypatch.setattr(sending, "SAMPLE", 4)
        monkeypatch.setattr(sending, "MANY", 8)
    return bool(request.param == "asking first")


@pytest.mark.usefixtures("large")
def test_a_chunk_that_two_files_share_travels_once(client: RegistryClient, link: SlowLink, tmp_path: Path) -> None:
    """Both at the same time: a consolidated file beside one with the same tensors in another order, and a copy."""
    directory = model(tmp_path / "model")
    backwards = safetensors(dict(reversed(TENSORS.items())))
    (directory / "consolidated.safetensors").write_bytes(backwards)
    (directory / "copy.safetensors").write_bytes(backwards)
    pushed = push(client, directory, BASE)
    assert pushed.sent_bytes <= link.sent <= len(backwards) + ROOM
    check(client, directory, BASE, pushed)


@pytest.mark.one_database
@pytest.mark.parametrize("cuts", [[7 * MIB], [7 * MIB, 3 * MIB, 5 * MIB, 2 * MIB]])
def test_a_connection_that_breaks(client: RegistryClient, link: SlowLink, tmp_path: Path, cuts: list[int]) -> None:
    known = seeded(8 * MIB, 4)
    push(client, model(tmp_path / "base", more=known), BASE)
    directory = model(tmp_path / "mixed", more=known + seeded(16 * MIB, 5))  # a third is known: it goes by chunks
    before, link.cuts = link.sent, list(cuts)
    pushed = push(client, directory, TUNED)
    assert link.cuts == []
    check(client, directory, TUNED, pushed)
    assert link.sent - before <= 16 * MIB + len(cuts) * 4 * MIB + ROOM  # at most a batch for each break


@pytest.mark.one_database
def test_a_large_new_file_is_not_read_before_it_is_sent(
    client: RegistryClient, link: SlowLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SAMPLE", 4)
    monkeypatch.setattr(sending, "MANY", 8)
    read: list[str] = []

    def noting(local: Path, path: str, *rest: Any) -> Any:
        read.append(path)
        return recipe_of(local, path, *rest)

    monkeypatch.setattr(sending, "recipe_of", noting)
    base, tuned = model(tmp_path / "base"), model(tmp_path / "tuned", 3)
    size = (base / "model.safetensors").stat().st_size
    first = push(client, base, BASE)
    assert (read, first.new_bytes) == ([], size + 2)
    assert size <= first.sent_bytes <= link.sent <= size + ROOM
    check(client, base, BASE, first)
    before = link.sent
    second = push(client, tuned, TUNED)
    assert read == ["model.safetensors"]
    assert second.sent_bytes <= link.sent - before <= 2 * MIB + ROOM
    check(client, tuned, TUNED, second)


@pytest.mark.one_database
@pytest.mark.usefixtures("large")
def test_a_new_file_goes_on_where_its_connection_broke(client: RegistryClient, link: SlowLink, tmp_path: Path) -> None:
    directory = model(tmp_path / "model", more=seeded(40 * MIB, 10))
    link.cuts = [50 * MIB, 6 * MIB]
    pushed = push(client, directory, BASE)
    assert link.cuts == []
    check(client, directory, BASE, pushed)
    assert link.sent <= pushed.logical_bytes + 2 * 4 * MIB + 3 * 8 * MIB + ROOM  # batches, and what was under way


@pytest.mark.one_database
def test_a_link_that_always_breaks_is_given_up(client: RegistryClient, link: SlowLink, tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    started: list[StartedPush] = []
    start = client.start_push

    def noting(*args: Any, **kwargs: Any) -> StartedPush:
        started.append(start(*args, **kwargs))
        link.cuts = [100_000] * 50
        return started[-1]

    client.start_push = noting  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        push(client, directory, BASE)
    link.cuts = []
    assert client.repos() == []


def test_a_pusher_that_is_killed_and_comes_again(
    helios: Any, helios_home: Home, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    with running_registry(helios) as registry:
        parts = urlsplit(registry.url)
        with SlowLink(parts.hostname or "", parts.port or 0, None) as link:
            with contextlib.closing(registry.client()) as client:
                push(client, model(tmp_path / "base"), BASE)
                directory = model(tmp_path / "tuned", 1)
                (directory / "more.dat").write_bytes(seeded(80 * MIB, 6))
                process = helios.start(
                    "push", directory, "org/tuned", "--registry", link.url, stderr=subprocess.DEVNULL
                )
                wait_for(lambda: link.sent > 8 * MIB, 30, what="bytes going")
                process.kill()
                process.wait(10)
                assert [repo.id for repo in client.repos()] == [BASE]
                pushed = push(client, directory, TUNED)
                check(client, directory, TUNED, pushed)
    assert check_whole(helios_home, helios.environ) == {BASE.id, TUNED.id}


@pytest.mark.one_database
@pytest.mark.parametrize("after", [1 * MIB, 5 * MIB])
def test_a_registry_that_is_killed_during_a_push(
    helios: Any, helios_home: Home, tmp_path: Path, wait_for: Callable[..., None], after: int
) -> None:
    """On PostgreSQL what a killed process has stored stays until its lease is over (test_registry_kills.py)."""
    known = seeded(8 * MIB, 4)
    base = model(tmp_path / "base", more=known)
    mixed = model(tmp_path / "mixed", 2, more=known + seeded(16 * MIB, 7))
    with running_registry(helios) as registry:
        parts = urlsplit(registry.url)
        with SlowLink(parts.hostname or "", parts.port or 0, None) as link:
            with contextlib.closing(registry.client(link.url)) as client:
                push(client, base, BASE)
                outcome: list[object] = []

                def pushing() -> None:
                    try:
                        outcome.append(push(client, mixed, TUNED).commit)
                    except HeliosError as error:
                        outcome.append(error)

                before = link.sent
                pusher = threading.Thread(target=pushing)
                pusher.start()
                wait_for(lambda: link.sent - before > after, 30, what="bytes going")
                registry.kill()
                pusher.join(60)
                assert isinstance(outcome[0], Unavailable)
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        assert [repo.id for repo in client.repos()] == [BASE]
    check_whole(helios_home, helios.environ)
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        check(client, mixed, TUNED, push(client, mixed, TUNED))
    check_whole(helios_home, helios.environ)


def test_of_concurrent_pushes_by_chunks_one_wins(registry: Running, tmp_path: Path) -> None:
    with contextlib.closing(registry.client()) as client:
        push(client, model(tmp_path / "base"), BASE)
        base = push(client, model(tmp_path / "first", 0), TUNED).commit
        outcomes: list[object] = []
        ready = threading.Barrier(3)

        def pushing(number: int) -> None:
            directory = model(tmp_path / f"m{number}", number, seed=200 + number)
            with contextlib.closing(registry.client()) as mine:
                commit = mine.commit_push

                def together(id_: str) -> Pushed:
                    ready.wait(60)
                    return commit(id_)

                mine.commit_push = together  # type: ignore[method-assign]
                try:
                    outcomes.append(push(mine, directory, TUNED).commit)
                except HeliosError as error:
                    outcomes.append(error)

        threads = [threading.Thread(target=pushing, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        (won,) = (each for each in outcomes if isinstance(each, str))
        lost = [each for each in outcomes if isinstance(each, Conflict)]
        assert len(lost) == 2
        assert all(
            "org/tuned: the ref 'main' has moved" in each.message or "has moved" in each.message for each in lost
        )
        assert client.refs(TUNED) == {"main": won}
        assert client.commits(TUNED, "main")[1].commit == base


@pytest.mark.one_database
def test_an_older_registry_gets_whole_files(client: RegistryClient, link: SlowLink, tmp_path: Path) -> None:
    """One that does not say that it takes recipes, as those before did not."""
    assert msgspec.json.decode(b'{"push": "x"}', type=StartedPush) == StartedPush("x", recipes=False)
    start = client.start_push
    client.start_push = lambda *args, **kwargs: StartedPush(start(*args, **kwargs).push)  # type: ignore[method-assign]

    def never(*_: object) -> Offered:
        raise AssertionError("a recipe was offered")

    client.offer = never  # type: ignore[method-assign]
    directory = model(tmp_path / "model")
    for repo in (BASE, TUNED):
        pushed = push(client, directory, repo)
        assert pushed.sent_bytes == pushed.logical_bytes
        check(client, directory, repo, pushed)


@pytest.mark.one_database
def test_a_file_that_changes_between_looking_and_sending(client: RegistryClient, tmp_path: Path) -> None:
    push(client, model(tmp_path / "base"), BASE)
    directory = model(tmp_path / "tuned", 3)
    put_chunks = client.put_chunks

    def changing(*args: Any) -> None:
        with open(directory / "model.safetensors", "r+b") as file:
            file.seek(7 * MIB)
            file.write(b"other bytes")
        put_chunks(*args)

    client.put_chunks = changing  # type: ignore[method-assign]
    with pytest.raises(InvalidInput, match=r"model\.safetensors: changed while it was published"):
        push(client, directory, TUNED)
    assert [repo.id for repo in client.repos()] == [BASE]


@pytest.mark.one_database
def test_a_registry_that_asks_for_nonsense(client: RegistryClient, tmp_path: Path) -> None:
    push(client, model(tmp_path / "base"), BASE)
    directory = model(tmp_path / "tuned", 3)
    for answer, message in (
        (Offered([(1, 1)]), "loses chunks as fast as they come"),
        (Offered([(900, 1)]), "chunks that the file does not have"),
        (Offered([]), "chunks that the file does not have"),
    ):
        client.offer = lambda *_, answer=answer: answer  # type: ignore[method-assign, misc]
        with pytest.raises(Unavailable, match=message):
            push(client, directory, TUNED)


@pytest.mark.one_database
def test_small_files_are_sent_without_asking(client: RegistryClient, tmp_path: Path) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    for number in range(20):
        (directory / f"{number}.json").write_text(json.dumps({"n": number}))
    client.offer = None  # type: ignore[method-assign, assignment]
    check(client, directory, BASE, push(client, directory, BASE))


def put(registry: Running, push_id: str, what: str, body: bytes, path: str = "w.bin") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(urlsplit(registry.url).netloc, timeout=20)
    with contextlib.closing(connection):
        connection.request("PUT", f"/api/v1/pushes/{push_id}/{what}?path={quote(path)}", body=body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_hostile_requests_get_a_clear_4xx(registry: Running, tmp_path: Path) -> None:
    content = seeded(100_000, 1)
    (tmp_path / "w.bin").write_bytes(content)
    recipe = recipe_of(tmp_path / "w.bin", "w.bin", len(content))
    ((id_, length),) = recipe.chunks()
    head = batch.encode_head([(id_, length)])
    with contextlib.closing(registry.client()) as client:
        files = [{"path": "w.bin", "size": len(content)}]
        push_id = client.start_push(BASE, "main", files, message="", author="").push
        record = recipe.encode()
        for what, body in (
            ("recipes", b""),
            ("recipes", b"x" * 100),
            ("recipes", record[:-1]),
            ("recipes", bytes(batch.MAX_RECIPE + 1)),
            ("chunks", b""),
            ("chunks", head[:10]),
            ("chunks", b"\0\0\0\0"),
            ("chunks", b"\xff\xff\xff\xff"),
            ("chunks", batch.encode_head([(id_, 0)])),
            ("chunks", batch.encode_head([(id_, 1 << 31)])),
            ("chunks", head + content[:-1]),
            ("chunks", head + content + b"x"),
            ("chunks", head + bytes(length)),
        ):
            status, answer = put(registry, push_id, what, body)
            assert (status, answer["error"]["code"]) == (400, "InvalidInput"), (what, body[:20], answer)
        for body in (b"", head[:10], b"\xff\xff\xff\xff", batch.encode_head([(id_, 1 << 31)])):
            with pytest.raises(InvalidInput):
                client.known_chunks(push_id, "w.bin", body)
        assert client.known_chunks(push_id, "w.bin", head) == 0
        assert put(registry, push_id, "recipes", record, path="other")[0] == 400
        assert put(registry, "0" * 32, "recipes", record)[0] == 404
        assert put(registry, "0" * 32, "chunks", head + content)[0] == 404
        assert put(registry, push_id, "recipes", record) == (200, {"missing": [[0, 1]], "whole": True})
        assert put(registry, push_id, "chunks", head + content) == (200, {"new_bytes": length})
        assert put(registry, push_id, "recipes", record)[1]["sha256"] == recipe.blob
        assert client.repos() == []
        client.commit_push(push_id)


@pytest.mark.one_database
def test_what_a_person_is_told(registry: Running, helios: Any, tmp_path: Path) -> None:
    """On a terminal: what was sent and what was there."""
    directory = model(tmp_path / "model")
    helios("push", directory, "org/base")
    done = on_a_terminal(helios, "push", directory, "org/again", "--registry", registry.url)
    assert done.code == 0
    assert len(done.out) == 41
    assert "2 files, 16.8 MB: " in done.err
    assert " sent; 0 B new, 16.8 MB stored already" in done.err


@pytest.mark.one_database
def test_progress_ends_where_the_bytes_do(client: RegistryClient, tmp_path: Path) -> None:
    """It never goes back, and never beyond the whole."""
    push(client, model(tmp_path / "base"), BASE)
    directory = model(tmp_path / "tuned", 3, more=seeded(3 * MIB, 8))
    shown: list[int] = []
    tallies: list[OpenPush] = []
    chunks = ByChunks()

    def sender(push_: OpenPush, file: LocalFile) -> None:
        tallies.append(push_)
        chunks(push_, file)

    pushed = publish(client, directory, TUNED, "main", progress=shown.append, sender=sender)
    assert shown == sorted(shown)
    assert tallies[0].tally.done == pushed.logical_bytes
    assert all(done <= pushed.logical_bytes for done in shown)
