"""Damage in a registry's store: the Hub's clients never get a wrong byte."""

from __future__ import annotations

import hashlib
import http.client
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.command import Command
from tests.support.damage import flip
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.hub_site import Site, write
from tests.support.registry import running_registry


def largest_object(home: Path) -> Path:
    objects = [
        path for path in (home / "store" / "public").rglob("*") if path.is_file() and "recipes" not in path.parts
    ]
    return max(objects, key=lambda path: path.stat().st_size)


@pytest.mark.both_databases
def test_a_record_that_is_gone_is_no_missing_file(tmp_path, databases):
    """A client that hears 404 with a commit remembers for ever that the file does not exist."""
    helios = Command(tmp_path / "home", **databases())
    with running_registry(helios) as registry:
        commit = helios("push", str(write(tmp_path / "m", {"config.json": b"{}"})), "org/m")
    for path in (tmp_path / "home" / "store" / "public" / "recipes").rglob("*"):
        if path.is_file():
            path.unlink()
    with running_registry(helios, errors="the store has a gap.*recipes/") as registry:
        site = Site(registry, {}, "", commit, tmp_path, helios)
        status, headers, _ = site.ask("GET", "/org/m/resolve/main/config.json")
        assert (status, headers["x-error-code"]) == (502, "Integrity")
        assert "x-repo-commit" not in headers


def test_a_damaged_chunk_never_leaves(tmp_path, expected_log_errors):
    """At the start: a clean 502. Behind data that was sent: the connection breaks, and the resumed request gets 502."""
    helios = Command(tmp_path / "home")
    weights = hashlib.shake_256(b"w").digest(40 << 20)
    with running_registry(helios, errors="a chunk in the store is damaged and was not sent.*w.bin") as registry:
        helios("push", str(write(tmp_path / "m", {"w.bin": weights, "config.json": b"{}"})), "org/m")
        site = Site(registry, {}, "", "", tmp_path, helios)
        target = largest_object(tmp_path / "home")
        assert target.stat().st_size == len(weights)
        assert site.ask("GET", "/org/m/resolve/main/w.bin")[2] == weights  # passed once, and remembered as such
        damaged = 33 << 20
        flip(target, damaged)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)) as caught:
            site.ask("GET", "/org/m/resolve/main/w.bin")
        if isinstance(caught.value, http.client.IncompleteRead):
            got = caught.value.partial
            assert got == weights[: len(got)]
            assert len(got) <= 32 << 20
        chunk = range(32 << 20, 36 << 20)
        for wanted in (damaged, chunk[0], chunk[-1]):
            status, headers, body = site.ask(
                "GET", "/org/m/resolve/main/w.bin", {"range": f"bytes={wanted}-{wanted + 9}"}
            )
            assert (status, headers["x-error-code"]) == (502, "Integrity")
            assert "(bytes 33554432 to 37748736)" in headers["x-error-message"]
            assert weights[wanted : wanted + 9] not in body
        # What is whole is still served, the neighbours in the same object included.
        for wanted in (chunk[0] - 10, chunk[-1] + 1):
            status, _, body = site.ask("GET", "/org/m/resolve/main/w.bin", {"range": f"bytes={wanted}-{wanted + 8}"})
            assert (status, body) == (206, weights[wanted : wanted + 9])
        assert site.ask("GET", "/org/m/resolve/main/config.json")[2] == b"{}"
        assert "helios_registry_verify_failures_total 4.0" in site.ask("GET", "/metrics")[2].decode()
        script = """
        result = raised(hf_hub_download, "org/m", "w.bin")
        whole = [p for p in Path(os.environ["HF_HOME"]).rglob("*") if p.is_file() and p.stat().st_size >= 40 << 20]
        assert result and not whole, (result, whole)
        """
        with ThreadPoolExecutor() as threads:
            runs = [threads.submit(run_client, v, script, registry.url, tmp_path / f"hf-{v}") for v in VERSIONS]
            assert all(run.result() for run in runs), "no client may take it for whole"
