"""Xet's routes: what a client asks is answered exactly, what nobody may ask is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount, Router
from starlette.testclient import TestClient

from helios.names import RepoId
from registry.metadata import quarantine, repositories
from registry.xet.layout import Part, Reconstruction
from registry.xet.routes import TOKEN_S
from tests.support.damage import flip
from tests.support.xet_client import put_together
from tests.support.xet_site import XetParts, xet_parts

A = hashlib.shake_256(b"a").digest(900_000)
W = A + hashlib.shake_256(b"b").digest(300_000) + A
FILES = {"w.onnx": W, "config.json": b"{}", "empty.onnx": b""}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XetParts]:
    with xet_parts(tmp_path_factory.mktemp("xet")) as found:
        found.publish("models/org/m", FILES)
        found.publish("models/org/other", {"x.onnx": b"x" * 100_000})
        yield found


@pytest.fixture(scope="module")
def client(parts: XetParts) -> Iterator[TestClient]:
    with TestClient(parts.app(), base_url="http://registry:8470") as found:
        yield found


def token(client: TestClient, repo: str = "org/m") -> dict[str, str]:
    answer = client.get(f"/api/models/{repo}/xet-read-token/main")
    assert answer.status_code == 200
    assert answer.headers["x-xet-cas-url"] == "http://registry:8470/xet"
    assert answer.json() == {
        "casUrl": answer.headers["x-xet-cas-url"],
        "accessToken": answer.headers["x-xet-access-token"],
        "exp": int(answer.headers["x-xet-token-expiration"]),
    }
    return {"authorization": f"Bearer {answer.headers['x-xet-access-token']}"}


def file_hash(client: TestClient) -> str:
    return str(client.head("/org/m/resolve/main/w.onnx").headers["x-xet-hash"])


class Fetcher:
    """Takes an answer, of either version, and fetches what it says."""

    def __init__(self, client: TestClient, answer: dict[str, Any]) -> None:
        self.client = client
        self.addresses: dict[tuple[int, int, int], tuple[str, dict[str, int]]] = {}
        found = answer.get("fetch_info") or {
            name: [
                {"url": entry["url"], "range": r["chunks"], "url_range": r["bytes"]}
                for entry in entries
                for r in entry["ranges"]
            ]
            for name, entries in answer["xorbs"].items()
        }
        names = list(found)
        fetch: dict[int, list[tuple[int, int]]] = {}
        for number, name in enumerate(names):
            for entry in found[name]:
                first, stop = entry["range"]["start"], entry["range"]["end"]
                fetch.setdefault(number, []).append((first, stop))
                self.addresses[number, first, stop] = entry["url"], entry["url_range"]
        parts = [
            Part(names.index(term["hash"]), term["range"]["start"], term["range"]["end"], term["unpacked_length"])
            for term in answer["terms"]
        ]
        self.plan = Reconstruction(answer["offset_into_first_range"], parts, fetch)

    def __call__(self, number: int, first: int, stop: int) -> bytes:
        url, span = self.addresses[number, first, stop]
        answer = self.client.get(url, headers={"range": f"bytes={span['start']}-{span['end']}"})
        assert answer.status_code == 206
        assert int(answer.headers["content-length"]) == span["end"] - span["start"] + 1 == len(answer.content)
        assert answer.headers["content-range"].startswith(f"bytes {span['start']}-{span['end']}/")
        return answer.content


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["v1", "v2"]))
def test_any_range_is_put_together(client: TestClient, data: st.DataObject, version: str) -> None:
    start = data.draw(st.integers(0, len(W) - 1))
    last = data.draw(st.integers(start, len(W) + 10))
    answer = client.get(
        f"/xet/{version}/reconstructions/{file_hash(client)}",
        headers={**token(client), "range": f"bytes={start}-{last}"},
    )
    assert answer.status_code == 200
    fetcher = Fetcher(client, answer.json())
    wanted = W[start : last + 1]
    assert put_together(fetcher.plan, fetcher, len(wanted)) == wanted


def test_without_a_range_it_is_the_whole_file(client: TestClient) -> None:
    answer = client.get(f"/xet/v1/reconstructions/{file_hash(client)}", headers=token(client))
    fetcher = Fetcher(client, answer.json())
    assert put_together(fetcher.plan, fetcher, len(W)) == W
    assert sum(r["end"] - r["start"] for _, r in fetcher.addresses.values()) < len(W) - 700_000, "A comes once"


def test_a_hash_is_everywhere_or_nowhere(parts: XetParts, client: TestClient) -> None:
    """HEAD and GET of a file, the tree, paths-info: a client may take any of them for all."""
    announced = [(client, True)]
    with TestClient(parts.app(on=False)) as quiet:
        announced.append((quiet, False))
        for asked, on in announced:
            tree = {item["path"]: item for item in asked.get("/api/models/org/m/tree/main?recursive=true").json()}
            body = {"paths": list(FILES), "expand": True}
            found = {item["path"]: item for item in asked.post("/api/models/org/m/paths-info/main", json=body).json()}
            for path in FILES:
                head, get = asked.head(f"/org/m/resolve/main/{path}"), asked.get(f"/org/m/resolve/main/{path}")
                hashes = {
                    tree[path].get("xetHash"), found[path].get("xetHash"),
                    head.headers.get("x-xet-hash"), get.headers.get("x-xet-hash"),
                }  # fmt: skip
                assert len(hashes) == 1
                assert (hashes != {None}) == (on and path == "w.onnx")
                assert ("xet-auth" in head.links) == ("xet-auth" in get.links) == (hashes != {None})
        # Who has seen a hash before gets the file all the same.
        assert quiet.get(f"/xet/v2/reconstructions/{file_hash(client)}", headers=token(client)).status_code == 200


def test_the_link_leads_to_the_token(client: TestClient) -> None:
    link = client.head("/org/m/resolve/main/w.onnx").links["xet-auth"]["url"]
    assert link.startswith("http://registry:8470/api/models/org/m/xet-read-token/")
    assert client.get(link).json()["casUrl"] == "http://registry:8470/xet"


def test_under_a_prefix_every_address_has_it(parts: XetParts) -> None:
    app = Starlette(routes=[Mount("/t/{tenant}", app=Router(parts.routes()))])
    with TestClient(app, base_url="http://host") as client:
        link = client.head("/t/acme/org/m/resolve/main/w.onnx").links["xet-auth"]["url"]
        assert link.startswith("http://host/t/acme/api/models/org/m/xet-read-token/")
        answer = client.get(link)
        cas = answer.headers["x-xet-cas-url"]
        assert cas == "http://host/t/acme/xet"
        headers = {"authorization": f"Bearer {answer.headers['x-xet-access-token']}"}
        name = client.head("/t/acme/org/m/resolve/main/w.onnx").headers["x-xet-hash"]
        fetcher = Fetcher(client, client.get(f"{cas}/v2/reconstructions/{name}", headers=headers).json())
        assert put_together(fetcher.plan, fetcher, len(W)) == W
        assert all(url.startswith(cas + "/v1/xorbs/") for url, _ in fetcher.addresses.values())


def test_who_may_ask(parts: XetParts, client: TestClient) -> None:
    url = f"/xet/v1/reconstructions/{file_hash(client)}"
    mine = token(client)
    assert client.get(url).status_code == 401
    for wrong in ("Bearer", "Bearer x", f"Basic {mine['authorization'][7:]}", mine["authorization"][:-3]):
        assert client.get(url, headers={"authorization": wrong}).status_code == 401
    assert client.get(url, headers=token(client, "org/other")).status_code == 404
    assert client.get("/api/models/org/none/xet-read-token/main").status_code == 404
    assert client.get("/api/models/org/m/xet-read-token/none").headers["x-error-code"] == "RevisionNotFound"
    assert client.post("/api/models/org/m/xet-read-token/main").status_code == 405
    parts.now[0] += TOKEN_S
    try:
        assert client.get(url, headers=mine).status_code == 403
    finally:
        parts.now[0] -= TOKEN_S


def test_addresses_of_xorbs(parts: XetParts, client: TestClient) -> None:
    answer = client.get(f"/xet/v1/reconstructions/{file_hash(client)}", headers=token(client)).json()
    ((name, (entry,)),) = answer["fetch_info"].items()
    url = entry["url"]
    whole = client.get(url)
    assert whole.status_code == 200
    assert int(whole.headers["content-length"]) == len(whole.content)
    for span in ("0-0", "3-3", "7-8", "8-8", f"{len(whole.content) - 1}-", "-5", "100000-500000"):
        got = client.get(url, headers={"range": f"bytes={span}"})
        low, _, high = span.partition("-")
        start = int(low) if low else len(whole.content) - int(high)
        stop = int(high) + 1 if low and high else len(whole.content)
        assert (got.status_code, got.content) == (206, whole.content[start:stop])
    past = client.get(url, headers={"range": f"bytes={len(whole.content)}-"})
    assert (past.status_code, past.headers["content-range"]) == (416, f"bytes */{len(whole.content)}")
    head = client.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(whole.content)))
    bare = url.partition("?")[0]
    assert client.get(bare).status_code == 401
    assert client.get(url[:-2]).status_code == 401
    mine = token(client)["authorization"].partition(" ")[2]
    assert client.get(f"{bare}?grant={mine}").status_code == 401
    assert client.get(url.replace(name, "0" * 64)).status_code == 404
    parts.now[0] += TOKEN_S
    try:
        assert client.get(url).status_code == 403, "clients ask for new addresses when they hear 403"
    finally:
        parts.now[0] -= TOKEN_S


@pytest.mark.parametrize("name", ["x", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "%00" * 10, "0" * 5000])
@pytest.mark.parametrize("path", ["v1/reconstructions", "v2/reconstructions", "v1/xorbs"])
def test_malformed_hashes(client: TestClient, path: str, name: str) -> None:
    assert client.get(f"/xet/{path}/{name}", headers=token(client)).status_code == 400


def test_ranges_of_files(client: TestClient) -> None:
    url, mine = f"/xet/v1/reconstructions/{file_hash(client)}", token(client)
    past = client.get(url, headers={**mine, "range": f"bytes={len(W)}-"})
    assert (past.status_code, past.headers["content-range"]) == (416, f"bytes */{len(W)}")
    for nonsense in ("bytes=5-3", "bytes=", "lines=1-2", "bytes=1-2,5-6", "bytes=9" * 40):
        answer = client.get(url, headers={**mine, "range": nonsense})
        assert answer.status_code == 200
        assert sum(term["unpacked_length"] for term in answer.json()["terms"]) == len(W)


def test_other_methods_and_paths(client: TestClient) -> None:
    assert client.post("/xet/v1/telemetry", content=b"{}").status_code == 204
    assert client.get(f"/xet/v1/chunks/default/{'0' * 64}").status_code == 404
    assert client.post(f"/xet/v1/xorbs/default/{'0' * 64}").status_code in (404, 405)


def test_datasets_and_names_of_one_segment(parts: XetParts, client: TestClient) -> None:
    parts.publish("datasets/squad", {"w.onnx": W})
    head = client.head("/datasets/squad/resolve/main/w.onnx")
    assert head.headers["x-xet-hash"] == file_hash(client)
    link = head.links["xet-auth"]["url"]
    assert link.startswith("http://registry:8470/api/datasets/squad/xet-read-token/")
    headers = {"authorization": f"Bearer {client.get(link).json()['accessToken']}"}
    fetcher = Fetcher(client, client.get(f"/xet/v2/reconstructions/{file_hash(client)}", headers=headers).json())
    assert put_together(fetcher.plan, fetcher, len(W)) == W


def test_what_is_kept_back_is_not_given_this_way_either(tmp_path: Path) -> None:
    """Nor to who got the address before."""
    with xet_parts(tmp_path / "xet") as parts, TestClient(parts.app()) as client:
        parts.publish("models/org/m", {"w.onnx": A})
        url, mine = f"/xet/v1/reconstructions/{file_hash(client)}", token_of(client)
        ((_, (entry,)),) = client.get(url, headers=mine).json()["fetch_info"].items()
        assert client.get(entry["url"]).status_code == 200
        with parts.catalog.database.write() as connection:
            repository = repositories.require(connection, RepoId.parse("org/m"))
            blob = hashlib.sha256(A).hexdigest()
            quarantine.hold(connection, repository, [("w.onnx", blob, "something wrong")], 1)
        parts.catalog.forget()
        assert client.get(url, headers=mine).status_code == 403
        assert client.get(entry["url"]).status_code == 403


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["v1/reconstructions/", "v2/reconstructions/", "v1/xorbs/", "v1/", ""]),
    name=st.one_of(st.text(max_size=70), st.from_regex(r"[0-9a-f]{64}", fullmatch=True)),
    query=st.one_of(st.just(""), st.text(max_size=200)),
    span=st.one_of(st.none(), st.text(st.characters(codec="latin-1", min_codepoint=32), max_size=50)),
    access=st.one_of(st.none(), st.text(st.characters(codec="latin-1", min_codepoint=32), max_size=200)),
)
def test_nothing_that_is_asked_breaks_it(
    client: TestClient, path: str, name: str, query: str, span: str | None, access: str | None
) -> None:
    headers = {"range": span, "authorization": access}
    sent = {name: value.encode("latin-1") for name, value in headers.items() if value is not None}
    answer = client.get(f"/xet/{path}{quote(name, safe='')}?grant={quote(query)}", headers=sent)
    assert 400 <= answer.status_code < 500


def test_damage_never_leaves(tmp_path: Path, expected_log_errors: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected_log_errors("a chunk in the store is damaged")
    with xet_parts(tmp_path / "xet") as parts, TestClient(parts.app()) as client:
        commit = parts.publish("models/org/m", {"w.onnx": A})
        answer = client.get(f"/xet/v1/reconstructions/{file_hash(client)}", headers=token_of(client)).json()
        ((_, (entry,)),) = answer["fetch_info"].items()
        (path,) = [p for p in (parts.store.root / "public/blobs").rglob("*") if p.is_file()]
        flip(path, 500_000)
        got = client.get(urlsplit(entry["url"])._replace(scheme="", netloc="").geturl())
        assert (got.status_code, json.loads(got.content)["error"]["code"]) == (502, "Integrity")
        (told,) = [vars(record) for record in caplog.records if "is damaged" in record.message]
        assert (told["model"], told["commit"]) == ("models/org/m", commit), "whom it concerns"
        path.unlink()
        assert client.get(entry["url"]).status_code == 502
    with xet_parts(tmp_path / "xet") as parts, TestClient(parts.app()) as client:
        for path in (parts.store.root / "public/xet").rglob("*"):
            if path.is_file():
                path.unlink()
        url = f"/xet/v1/reconstructions/{file_hash(client)}"
        assert client.get(url, headers=token_of(client)).status_code == 502, "it is not missing, it is damaged"


def token_of(client: TestClient) -> dict[str, str]:
    return {"authorization": "Bearer " + client.get("/api/models/org/m/xet-read-token/main").json()["accessToken"]}


def test_a_head_that_is_answered_from_memory_announces_the_file_too(client: TestClient) -> None:
    for _ in range(3):
        got = client.get("/org/m/resolve/main/w.onnx", headers={"range": "bytes=0-0"})
        assert client.head("/org/m/resolve/main/w.onnx").headers["x-xet-hash"] == got.headers["x-xet-hash"]
