"""Files offered by their recipes: only what is missing travels, nothing is believed, nothing is given to strangers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from helios.errors import Conflict, HeliosError, IntegrityError, InvalidInput, NotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.batch import MAX_BATCH, MAX_CHUNKS, decode_entries, encode_head, entries_size
from heliosfs.store.cutting import cut
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from registry.access import PUBLIC, Access, Lister
from registry.gc.collect import Collector, Times
from registry.ingest.staged import StagedFile
from registry.metadata.database import Changes
from registry.metadata.tables import chunks
from registry.offers import Lacking
from registry.push_log import Announced, Outcome, StoredFile
from registry.pushes import Pushes
from tests.support.ingest import safetensors, seeded
from tests.unit.registry.conftest import Registry

MIB = 1 << 20
ALL = Lister(PUBLIC, set())
REPO = RepoId.parse("org/tuned")
TENSORS = {f"t{number}": seeded(2 * MIB, number) for number in range(6)}
BASE = safetensors(TENSORS)
TUNED = safetensors(TENSORS | {"t3": seeded(2 * MIB, 99)})


@pytest.fixture
def here(tmp_path: Path) -> Any:
    """One on SQLite alone, for what does not depend on the database."""
    parts = Registry.open(tmp_path / "here")
    yield parts
    parts.close()


def recipe_of(content: bytes, path: str = "m.safetensors") -> Recipe:
    start, out = 0, []
    for length in cut(path, len(content), lambda count: content[:count]):
        out.append((blake3(content[start : start + length]).digest(), length))
        start += length
    return Recipe.build(hashlib.sha256(content).hexdigest(), out)


async def never() -> None:
    await asyncio.Event().wait()


async def parts(*data: bytes) -> AsyncIterator[bytes]:
    for part in data:
        yield part


def run(registry: Registry, main: Callable[[Pushes], Coroutine[Any, Any, None]]) -> None:
    async def with_pushes() -> None:
        pushes = Pushes(registry.catalog, registry.sessions)
        try:
            await main(pushes)
        finally:
            await pushes.aclose()

    asyncio.run(with_pushes())


class Client:
    """One push of one file, the way a client does it. ``sent`` counts the bytes of chunks."""

    def __init__(
        self, pushes: Pushes, content: bytes, path: str = "m.safetensors", repo: RepoId = REPO, sight: Lister = ALL
    ) -> None:
        self.pushes, self.content, self.path, self.repo, self.sight = pushes, content, path, repo, sight
        self.recipe = recipe_of(content, path)
        self.sent = 0

    async def start(self, *more: Announced) -> Client:
        files = [Announced(self.path, len(self.content), False), *more]
        self.id = await self.pushes.start(self.repo, "main", "", "", files)
        return self

    def offer(self, recipe: Recipe | None = None) -> Awaitable[StoredFile | Lacking]:
        record = (recipe or self.recipe).encode()
        return self.pushes.offer(self.id, self.path, record, self.sight, never)

    async def asked(self) -> Lacking:
        answer = await self.offer()
        assert isinstance(answer, Lacking)
        return answer

    async def stored(self) -> StoredFile:
        answer = await self.offer()
        assert isinstance(answer, StoredFile)
        return answer

    async def send(self, lacking: Lacking) -> None:
        numbers = [number for first, count in lacking.missing for number in range(first, first + count)]
        spans = [self.recipe.span(number) for number in numbers]
        named = [(self.recipe.id(number), end - start) for number, (start, end) in zip(numbers, spans, strict=True)]
        data = [self.content[start:end] for start, end in spans]
        await self.pushes.put_chunks(self.id, self.path, named, parts(*data), self.sight)
        self.sent += sum(map(len, data))

    async def push(self) -> Outcome:
        await self.start()
        answer = await self.offer()
        while isinstance(answer, Lacking):
            await self.send(answer)
            answer = await self.offer()
        return await self.pushes.commit(self.id)


def content_of(registry: Registry, repo: RepoId = REPO, path: str = "m.safetensors") -> bytes:
    commit = registry.catalog.resolve(repo, "main").commit
    entry = registry.catalog.contents.manifest(repo, commit).files[path]
    return registry.catalog.contents.blob_reader(repo, entry.sha256).read(0, entry.size)


def test_only_the_changed_tensor_travels_and_counts_as_new(registry: Registry) -> None:
    registry.publish("org/base", {"m.safetensors": BASE})

    async def main(pushes: Pushes) -> None:
        client = Client(pushes, TUNED)
        outcome = await client.push()
        assert client.sent == 2 * MIB
        assert (outcome.new_bytes, outcome.deduplicated_bytes) == (2 * MIB, len(TUNED) - 2 * MIB)
        assert (await pushes.start(REPO, "main", "", "", [Announced("x", 1, False)])) != client.id

    run(registry, main)
    assert content_of(registry) == TUNED
    # The same commit as if the whole file had been sent.
    entries = registry.catalog.contents.manifest(REPO, registry.catalog.resolve(REPO, "main").commit).files
    other = registry.publish("org/other", {"m.safetensors": TUNED})
    assert registry.catalog.contents.manifest(RepoId.parse("org/other"), other.commit).files == entries


def test_a_blob_that_is_here_costs_neither_bytes_nor_reading(here: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    content = seeded(5 * MIB, 1)
    here.publish("org/base", {"w.bin": content})

    def no_reading(*_: object) -> None:
        raise AssertionError("a stored blob was read")

    async def main(pushes: Pushes) -> None:
        client = Client(pushes, content, "again.bin")
        with monkeypatch.context() as patch:
            patch.setattr(here.store, "read_into", no_reading)
            await client.start()
            stored = await client.stored()
        assert (stored.new_bytes, stored.deduplicated_bytes) == (0, len(content))
        await pushes.commit(client.id)

    run(here, main)
    assert content_of(here, path="again.bin") == content


@pytest.mark.parametrize("name", ["a.txt", "a.bin", "noext"])
@pytest.mark.parametrize("first", ["b.bin", "b.txt"])
@pytest.mark.parametrize("content", [b"plain text\n" * 10_000, bytes(200_000)], ids=["text", "zeros"])
def test_a_stored_blob_gives_the_line_that_its_bytes_would(
    here: Registry, name: str, first: str, content: bytes
) -> None:
    """Whatever name it has been stored under: the same files make the same commit."""
    here.publish("org/base", {first: content})
    run(here, lambda pushes: _push(Client(pushes, content, name)))
    other = here.publish("org/sent", {name: content})
    at = here.catalog.resolve(REPO, "main").manifest_digest
    assert at == other.manifest


async def _push(client: Client) -> None:
    await client.push()


def test_a_stored_blob_is_no_way_around_the_check_of_safetensors(here: Registry) -> None:
    bad = b"\xff" * 100_000
    here.publish("org/base", {"w.bin": bad})

    async def main(pushes: Pushes) -> None:
        client = Client(pushes, bad, "w.bin")
        client.path = "w.safetensors"
        await client.start()
        with pytest.raises(InvalidInput, match=r"w\.safetensors: its safetensors header"):
            await client.offer()

    run(here, main)


def test_a_chunk_that_a_file_repeats_travels_once(here: Registry) -> None:
    content = bytes(9 * MAX_CHUNK) + seeded(MIB, 1)

    async def main(pushes: Pushes) -> None:
        client = Client(pushes, content, "z.bin")
        await client.push()
        assert client.sent < 3 * MAX_CHUNK

    run(here, main)
    assert content_of(here, path="z.bin") == content


def test_a_new_file_had_better_come_whole(here: Registry) -> None:
    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE).start()
        answer = await client.asked()
        assert answer == Lacking([(0, len(client.recipe))], whole=True)
        await pushes.put_body(client.id, client.path, parts(BASE))
        await client.stored()
        await pushes.commit(client.id)

    run(here, main)
    assert len([key for key in here.objects() if "/blobs/" in key]) == 1
    assert not any("/packs/" in key for key in here.objects())


def test_a_file_like_another_of_the_same_push_need_not_travel(here: Registry) -> None:
    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE).start(Announced("copy.safetensors", len(BASE), False))
        await pushes.put_body(client.id, client.path, parts(BASE))
        client.path = "copy.safetensors"
        await client.stored()
        await pushes.commit(client.id)

    run(here, main)


# --- hostile ---


def lying(client: Client, **changes: Any) -> Recipe:
    """The client's recipe with another ``blob``, or with chunk 2 of another ``id`` or ``length``."""
    entries = list(client.recipe.chunks())
    entries[2] = (changes.get("id", entries[2][0]), changes.get("length", entries[2][1]))
    if extra := len(client.content) - sum(length for _, length in entries):
        entries.append((bytes(32), extra))
    return Recipe.build(changes.get("blob", client.recipe.blob), entries)


def test_recipes_that_lie_are_refused_and_leave_nothing(here: Registry) -> None:
    here.publish("org/base", {"m.safetensors": BASE})
    before = here.objects()

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE).start()
        swapped = list(client.recipe.chunks())
        swapped[2], swapped[3] = swapped[3], swapped[2]
        for recipe, message in (
            (lying(client, blob="0" * 64), "its chunks are those of another file"),
            (Recipe.build("1" * 64, swapped), "its chunks are those of another file"),
            (lying(client, blob="2" * 64, length=MIB), "is stored with 2097152 bytes"),
            (Recipe.build("0" * 64, [(bytes(32), 5)]), "its recipe is of 5 bytes"),
        ):
            with pytest.raises(InvalidInput, match=message):
                await client.offer(recipe)
        record = client.recipe.encode()
        for damaged in (
            b"",
            b"HRCP",
            record[:-1],
            record + b"x",
            b"X" + record[1:],
            record[:40] + bytes(8) + record[48:],
        ):
            with pytest.raises(InvalidInput, match="recipe"):
                await pushes.offer(client.id, client.path, damaged, ALL, never)
        with pytest.raises(InvalidInput, match="does not list the path"):
            await pushes.offer(client.id, "other", record, ALL, never)
        with pytest.raises(InvalidInput, match="1 files were not sent yet"):
            await pushes.commit(client.id)
        await pushes.abort(client.id)

    run(here, main)
    assert here.objects() == before
    assert [info.repo.id for info in here.catalog.repos()] == ["org/base"]


def test_chunks_with_other_bytes_are_refused_and_leave_nothing(here: Registry) -> None:
    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE).start()
        (one, length), (two, other) = list(client.recipe.chunks())[1:3]
        start, end = client.recipe.span(1)
        good = BASE[start:end]
        for data, message in (
            (good[:-1] + b"\0", f"what came as chunk {one.hex()} has another hash"),
            (good[:-1], "the body has"),
            (good + b"x", "the body is longer than"),
            (b"", "the body has"),
        ):
            with pytest.raises(InvalidInput, match=message):
                await pushes.put_chunks(client.id, client.path, [(one, length)], parts(data), ALL)
        both = [(one, length), (two, other)]
        with pytest.raises(InvalidInput, match="another hash"):  # the second one: the first goes, too
            await pushes.put_chunks(client.id, client.path, both, parts(good, bytes(other)), ALL)
        assert (await client.asked()).missing == [(0, len(client.recipe))]
        with pytest.raises(InvalidInput, match="does not list the path"):
            await pushes.put_chunks(client.id, "other", [(one, length)], parts(good), ALL)
        with pytest.raises(NotFound, match="no push"):
            await pushes.put_chunks("0" * 32, client.path, [(one, length)], parts(good), ALL)

    run(here, main)
    assert here.objects() == set()


def test_heads_of_batches_are_checked() -> None:
    for count in (0, MAX_CHUNKS + 1, (1 << 32) - 1):
        with pytest.raises(InvalidInput, match=f"a batch of {count} chunks"):
            entries_size(count.to_bytes(4, "little"))
    one = [(bytes(32), 7)]
    head = encode_head(one)
    assert entries_size(head[:4]) == len(head) - 4
    assert decode_entries(head[4:]) == one
    for length in (0, MAX_CHUNK + 1):
        with pytest.raises(InvalidInput, match=f"has {length} bytes"):
            decode_entries(encode_head([(bytes(32), length)])[4:])
    with pytest.raises(InvalidInput, match="bytes of chunks"):
        decode_entries(encode_head([(bytes(32), MAX_CHUNK)] * (MAX_BATCH // MAX_CHUNK + 1))[4:])


# --- what changes meanwhile ---


def test_a_collection_between_question_and_answer_takes_nothing(here: Registry) -> None:
    here.publish("org/base", {"m.safetensors": BASE})

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, TUNED).start()
        lacking = await client.asked()
        here.catalog.delete_repo(RepoId.parse("org/base"))
        collector = Collector(here.catalog, Times(0, 0, 0, keep_history=False))
        for _ in range(4):
            here.clock[0] += 100_000
            await asyncio.to_thread(collector.run)
        await client.send(lacking)
        for _ in range(4):
            here.clock[0] += 100_000
            await asyncio.to_thread(collector.run)
        await client.stored()
        await pushes.commit(client.id)

    run(here, main)
    assert content_of(here) == TUNED


def test_a_chunk_that_goes_all_the_same_is_asked_for_again(registry: Registry) -> None:
    registry.publish("org/base", {"m.safetensors": BASE})

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, TUNED).start()
        await client.send(await client.asked())
        with registry.database.write(changes=Changes.ALL) as connection:
            connection.execute(chunks.delete().where(chunks.c.id == client.recipe.id(1)))
        assert await client.asked() == Lacking([(1, 1)], whole=False)
        await client.send(Lacking([(1, 1)], whole=False))
        await client.stored()
        await pushes.commit(client.id)

    run(registry, main)
    assert content_of(registry) == TUNED


def test_a_stored_chunk_that_is_damaged_is_not_the_clients_fault(
    here: Registry, expected_log_errors: Callable[[str], None]
) -> None:
    expected_log_errors("a chunk in the store is damaged")
    here.publish("org/base", {"m.safetensors": BASE})
    (blob,) = (key for key in here.objects() if "/blobs/" in key)
    file = here.root / "store" / blob
    file.chmod(0o644)
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, TUNED).start()
        await client.send(await client.asked())
        with pytest.raises(IntegrityError, match="is damaged in the registry's store"):
            await client.offer()

    run(here, main)


def test_chunks_of_a_push_that_is_given_up_go(registry: Registry) -> None:
    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE).start()
        await client.send(Lacking([(0, 3)], whole=False))
        assert any("/packs/" in key for key in registry.objects())
        other = await Client(pushes, BASE, repo=RepoId.parse("org/second")).start()
        assert (await other.asked()).missing == [(3, len(other.recipe) - 3)]  # found, and claimed from here on
        await pushes.abort(client.id)
        registry.sessions.clean()
        await other.send(Lacking([(3, len(other.recipe) - 3)], whole=False))
        await other.stored()
        await pushes.commit(other.id)
        await pushes.abort((await Client(pushes, TUNED).start()).id)

    run(registry, main)
    assert content_of(registry, RepoId.parse("org/second")) == BASE
    registry.catalog.delete_repo(RepoId.parse("org/second"))


def test_a_killed_registry_leaves_no_chunks(registry: Registry) -> None:
    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE).start()
        await client.send(Lacking([(0, 3)], whole=False))

    asyncio.run(main(Pushes(registry.catalog, registry.sessions)))
    if registry.database.kind.shared:
        return  # others go on with it
    again = registry.killed()
    again.sessions.recover()
    assert again.objects() == set()
    again.close()


def test_of_two_pushes_by_chunks_one_wins(registry: Registry) -> None:
    registry.publish("org/base", {"m.safetensors": BASE})

    async def main(pushes: Pushes) -> None:
        clients = [Client(pushes, safetensors(TENSORS | {"t1": seeded(2 * MIB, n)})) for n in (101, 102)]
        for client in clients:
            await client.start()
        for client in clients:
            await client.send(await client.asked())
            await client.stored()
        outcomes = await asyncio.gather(*(pushes.commit(c.id) for c in clients), return_exceptions=True)
        (conflict,) = (o for o in outcomes if isinstance(o, HeliosError))
        (won,) = (o for o in outcomes if isinstance(o, Outcome))
        assert isinstance(conflict, Conflict)
        assert "has moved" in conflict.message
        assert registry.catalog.refs(REPO) == {"main": won.commit}

    run(registry, main)


class Left(Exception):
    """What a body raises whose client has left."""


async def broken(*data: bytes) -> AsyncIterator[bytes]:
    for part in data:
        yield part
    raise Left


def test_what_came_of_a_file_is_not_sent_again(registry: Registry) -> None:
    """The client left after two thirds of a new file; it comes again, to the same push and with another one."""
    content = seeded(36 * MIB, 7)
    came = 24 * MIB

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, content, "w.dat").start()
        with pytest.raises(Left):
            await pushes.put_body(client.id, "w.dat", broken(*(content[at : at + MIB] for at in range(0, came, MIB))))
        other = Client(pushes, content, "w.dat", repo=RepoId.parse("org/other"))
        for each in (client, other):
            outcome = await each.push() if each is other else None
            if outcome is None:
                await each.send(await each.asked())
                stored = await each.stored()
                assert (stored.new_bytes, stored.deduplicated_bytes) == (len(content), 0)
                outcome = await pushes.commit(each.id)
            assert outcome.logical_bytes == len(content)
        assert client.sent <= len(content) - came + 2 * MAX_CHUNK  # what was under way may be lost
        assert other.sent == 0

    run(registry, main)
    assert content_of(registry, path="w.dat") == content


def test_a_second_call_for_a_file_ends_one_that_hangs(here: Registry) -> None:
    """As where a connection died without a word: what has come with it is kept."""
    content = seeded(36 * MIB, 8)

    async def hanging() -> AsyncIterator[bytes]:
        for at in range(0, 24 * MIB, MIB):
            yield content[at : at + MIB]
        await asyncio.Event().wait()

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, content, "w.dat").start()
        first = asyncio.ensure_future(pushes.put_body(client.id, "w.dat", hanging()))
        async with asyncio.timeout(20):
            while (await pushes.state(client.id)).bytes < 24 * MIB:
                await asyncio.sleep(0.01)
            lacking = await client.asked()
        assert not lacking.whole
        with pytest.raises(Unavailable, match="it is sent again"):
            await first
        await client.send(lacking)
        await client.stored()
        await pushes.commit(client.id)
        assert client.sent <= 12 * MIB + MAX_CHUNK

    run(here, main)
    assert content_of(here, path="w.dat") == content


def test_a_damaged_staging_file_is_not_taken_for_what_came(here: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that lost a write: what is kept is read back, and chunks from there on are asked for again."""
    content = seeded(36 * MIB, 9)
    settle = StagedFile.settle

    def losing(self: StagedFile) -> None:
        settle(self)
        os.pwrite(self.fd, b"lost", 9 * MIB)

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, content, "w.dat").start()
        body = broken(*(content[at : at + MIB] for at in range(0, 32 * MIB, MIB)))
        with monkeypatch.context() as patch:
            patch.setattr(StagedFile, "settle", losing)
            with pytest.raises(Left):
                await pushes.put_body(client.id, "w.dat", body)
        lacking = await client.asked()
        first = lacking.missing[0][0]
        assert client.recipe.span(first)[0] <= 9 * MIB
        await client.send(lacking)
        await client.stored()
        await pushes.commit(client.id)

    run(here, main)
    assert content_of(here, path="w.dat") == content


# --- whom content is given to ---

STRANGER = Lister(Access(hidden=("secret/*",)), set())


def test_who_knows_only_hashes_does_not_get_the_content(registry: Registry) -> None:
    """Each call goes to another process, as behind a load balancer."""
    registry.publish("secret/base", {"m.safetensors": BASE})

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE, sight=STRANGER).start()
        everything = [(0, len(client.recipe))]
        assert await client.asked() == Lacking(everything, whole=True)  # as if nothing of it was here
        chunks = list(client.recipe.chunks())
        assert await pushes.known(client.id, client.path, chunks, STRANGER) == 0
        client.pushes = other = Pushes(registry.catalog, registry.sessions)
        await client.send(Lacking([(0, 2)], whole=False))
        client.pushes = pushes
        assert await pushes.known(client.id, client.path, chunks, STRANGER) == 2, "what it has sent itself"
        lacking = await client.asked()
        assert lacking.missing == [(2, len(client.recipe) - 2)]
        await client.send(lacking)
        client.pushes = other
        await client.stored()  # who has sent all of it has it
        await pushes.commit(client.id)
        await other.aclose()

    run(registry, main)
    assert content_of(registry) == BASE


def test_what_lies_in_an_object_that_one_may_read_is_not_all_ones_own(registry: Registry) -> None:
    """A visible model shares one tensor of a hidden one's object; the other tensors in it stay hidden."""
    registry.publish("secret/base", {"m.safetensors": BASE})
    shared = safetensors({"t0": TENSORS["t0"], "own": seeded(2 * MIB, 50)})
    registry.publish("org/shares", {"m.safetensors": shared})

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE, sight=STRANGER).start()
        lacking = await client.asked()
        assert lacking.missing == [(0, 1), (2, len(client.recipe) - 2)]  # all but the header's neighbour, t0

    run(registry, main)


def test_what_a_tenant_sees_need_not_be_sent(registry: Registry) -> None:
    registry.publish("shared/base", {"m.safetensors": BASE})
    registry.publish("mine/old", {"other.safetensors": safetensors({"own": seeded(3 * MIB, 51)})})
    tenant = Lister(Access("mine", sees=("shared/*",), owns=("mine/*",)), set())

    async def main(pushes: Pushes) -> None:
        client = Client(pushes, TUNED, repo=RepoId.parse("mine/tuned"), sight=tenant)
        await client.push()
        assert client.sent == 2 * MIB

    run(registry, main)


def test_a_source_may_be_a_file(here: Registry) -> None:
    """Chunks are stored while bytes come in pieces of any size."""

    async def main(pushes: Pushes) -> None:
        client = await Client(pushes, BASE).start()
        start, end = client.recipe.span(1)
        stream = io.BytesIO(BASE[start:end])
        pieces = iter(lambda: stream.read(1000), b"")
        named = [(client.recipe.id(1), end - start)]
        assert await pushes.put_chunks(client.id, client.path, named, parts(*pieces), ALL) == end - start
        assert await pushes.put_chunks(client.id, client.path, named, parts(BASE[start:end]), ALL) == 0

    run(here, main)
