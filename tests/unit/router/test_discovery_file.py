"""Workers from a file: what is right counts, what is wrong or half written never does."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import WorkerSettings
from helios.errors import UsageError
from helios.metrics import RouterMetrics
from router.discovery.file import FileSource, Versions, parse
from router.discovery.source import Teller


def text(*urls: str, model: str = "m") -> bytes:
    return "".join(f'[[workers]]\nmodel = "{model}"\nurl = "{url}"\n' for url in urls).encode()


def urls(workers) -> list[str]:
    return [worker.url for worker in workers]


def test_a_file_says_all_that_a_worker_is():
    (worker,) = parse(
        b'[[workers]]\nmodel = "m"\nurl = "http://H:1/"\nrole = "decode"\nrevision = "abc"\nweight = 2\n'
        b'adapters = ["b", "a", "b"]\ncordoned = true\nkey_file = "/k"\n'
    ).workers
    assert worker == WorkerSettings(
        model="m", url="http://h:1", role="decode", revision="abc", weight=2.0, adapters=["a", "b"], cordoned=True,
        key_file="/k",
    )  # fmt: skip
    assert parse(b"").workers == ()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[[workers]]\nmodel = 'm'\nurl = 'http://h'\nwieght = 1\n", "wieght"),
        (b"[[worker]]\nmodel = 'm'\nurl = 'http://h'\n", "worker"),
        (b"[[workers]]\nurl = 'http://h'\n", "model"),
        (b"[[workers]]\nmodel = 'm'\nurl = 'ftp://h'\n", "ftp://h"),
        (b"[[workers]]\nmodel = 'm'\nurl = 'http://h'\nweight = 0\n", "weight"),
        (b"[[workers]]\nmodel = 'm'\nurl = 'http://h'\nweight = inf\n", "weight"),
        (text("http://h", "http://h/"), "twice"),
        (text("http://h") + b"role = 'decode'\n" + text("http://h", model="n"), "two roles"),
        (b"[[workers\n", "not valid TOML"),
        (b"\xff", "not valid TOML"),
        (b"#" * (5 << 20), "MiB"),
    ],
)
def test_a_wrong_file_is_refused_whole(content, named):
    with pytest.raises(UsageError) as caught:
        parse(content)
    assert named in caught.value.message


@given(st.data())
def test_only_a_version_that_two_looks_saw_counts_and_the_last_one_does(data):
    right = [text(*(f"http://h:{port}" for port in range(1, count + 1))) for count in range(4)]
    whole = st.sampled_from([*right, b"[[workers\n"])
    versions = Versions(right[0])
    for _ in range(data.draw(st.integers(0, 6))):
        content = data.draw(whole)
        if data.draw(st.booleans()):  # somebody writes it without replacing it
            torn = content[: data.draw(st.integers(0, len(content)))]
            before = versions.found
            if torn != content:
                assert not versions.look(torn)
                assert versions.found == before
        before = versions.found
        versions.look(content)
        try:
            changed = versions.look(content)
        except UsageError:
            assert versions.found == before, "the last right one stays"
            assert not versions.right
            continue
        if content in right:
            assert versions.found == parse(content)
            assert changed == (versions.found != before)
        assert not versions.look(content)


@asynccontextmanager
async def source(path, resumes=False):
    told, metrics = [], RouterMetrics()
    teller = Teller("file", lambda name, workers: told.append((name, urls(workers))), metrics)
    task = asyncio.create_task(FileSource(path, 0.01, teller, resumes=resumes).run())

    async def until(ready):
        async with asyncio.timeout(10):
            while not ready():
                assert not task.done(), task
                await asyncio.sleep(0.005)

    def failures(reason):
        return metrics.registry.get_sample_value(
            "helios_router_discovery_failures_total", {"source": "file", "reason": reason}
        )

    try:
        yield told, until, failures
    finally:
        task.cancel()
        await asyncio.wait([task])


def replace(path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)


def test_a_changed_file_is_told_and_a_wrong_or_missing_one_changes_nothing(tmp_path):
    path = tmp_path / "workers.toml"
    path.write_bytes(text("http://a"))

    async def scenario():
        async with source(path) as (told, until, failures):
            await until(lambda: told == [("file", ["http://a"])])
            replace(path, text("http://a", "http://b"))
            await until(lambda: told[1:] == [("file", ["http://a", "http://b"])])
            replace(path, b"[[workers]]\nmodle = 1\n")
            await until(lambda: failures("broken") == 1)
            path.unlink()
            await until(lambda: failures("unreadable") == 1)
            assert len(told) == 2
            stamp = os.stat(tmp_path)
            path.write_bytes(text("http://c"))
            os.utime(path, ns=(stamp.st_atime_ns, 0))
            await until(lambda: told[2:] == [("file", ["http://c"])])
            path.write_bytes(text("http://d"))
            os.utime(path, ns=(stamp.st_atime_ns, 0))  # same size, same time
            await until(lambda: told[3:] == [("file", ["http://d"])])
            assert (failures("broken"), failures("unreadable")) == (1, 1), "each is told once"

    asyncio.run(scenario())


def test_without_a_file_to_begin_with_nothing_starts(tmp_path):
    teller = Teller("file", lambda *_: None, RouterMetrics())
    with pytest.raises(UsageError, match=r"workers\.toml"):
        FileSource(tmp_path / "workers.toml", 1, teller)
    (tmp_path / "workers.toml").write_bytes(b"x = 1\n")
    with pytest.raises(UsageError, match=r"workers\.toml: it is wrong.*x"):
        FileSource(tmp_path / "workers.toml", 1, teller)


@pytest.mark.parametrize("found", [b"[[workers]]\nmodle = 1\n", None])
@pytest.mark.parametrize("later", [text("http://a"), b""])
def test_a_process_that_resumes_says_nothing_until_the_file_is_right(tmp_path, found, later):
    path = tmp_path / "workers.toml"
    if found is not None:
        path.write_bytes(found)

    async def scenario():
        async with source(path, resumes=True) as (told, until, failures):
            await until(lambda: failures("unreadable" if found is None else "broken") == 1)
            assert told == []
            replace(path, later)
            await until(lambda: told == [("file", urls(parse(later).workers))])

    asyncio.run(scenario())
