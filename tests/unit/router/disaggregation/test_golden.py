"""Each connector's two requests, for each API that it serves, as a relay sends them: tests/golden/disaggregation.

A file has the client's body, what the prefill worker gets and answers, and what the decode worker gets. ``known`` is
what was learned of the prefill worker before; ``probe`` what the decode worker was asked first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router.disaggregation.connectors import CONNECTORS, Learns
from tests.support.relaying import EVENTS, FakeConnection
from tests.support.splitting import Split, answer, asked, joins

FILES = Path(__file__).parents[3] / "golden" / "disaggregation"
NAMES = sorted(str(path.relative_to(FILES)) for path in FILES.glob("*/*.json"))
WORKERS = ("m=http://d:1,role=decode", "m=http://p:1,role=prefill,bootstrap=9001")


def scene_of(connector: str, case: dict[str, Any]) -> Split:
    scene = Split(connector=connector, workers=WORKERS, path=case["path"].encode(), min_tokens=1)
    splits, worker = scene.relay.splits, scene.workers.at("http://p:1")
    assert splits is not None
    assert worker is not None
    known = json.dumps(case.get("known")).encode()
    match CONNECTORS[connector].learns:
        case Learns.QUERY:
            assert splits.peers.queried(worker, known)
        case Learns.ANSWER:
            assert splits.peers.answered(worker, known)
    return scene.asks(json.dumps(case["client"]).encode())


def chunked(*events: dict[str, Any]) -> bytes:
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    return EVENTS + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)


def check(connection: FakeConnection, path: str, expected: dict[str, Any]) -> None:
    line, headers, body = asked(connection)
    assert line == f"POST {path} HTTP/1.1".encode()
    assert body == expected["body"]
    for name, value in expected.get("headers", {}).items():
        assert headers[name] == value.encode()
    assert ("x-data-parallel-rank" in headers) is ("x-data-parallel-rank" in expected.get("headers", {}))


@pytest.mark.parametrize("name", NAMES)
def test_both_workers_get_what_the_file_says(name: str) -> None:
    case = json.loads((FILES / name).read_text())
    connector, path = name.partition("/")[0], case["path"]
    scene = scene_of(connector, case)
    if "probe" in case:
        decode = joins(scene, b"d:1")
        check(decode, path, case["probe"])
        said = case["probe"]["answer"]
        decode.comes(answer(said["document"]) if "document" in said else chunked(*said["events"]))
        assert scene.text == b""
    prefill = joins(scene, b"p:1")
    check(prefill, path, case["prefill"])
    concurrent = CONNECTORS[connector].shape.name == "CONCURRENT"
    decode = joins(scene, b"d:1") if concurrent else prefill
    prefill.comes(answer(case["answer"]))
    decode = decode if concurrent else joins(scene, b"d:1")
    check(decode, path, case["decode"])
    decode.comes(answer({"choices": []}))
    assert scene.text.startswith(b"HTTP/1.1 200")
    assert scene.results() == {"remote": 1}
    scene.settled()


def test_there_is_a_file_for_each_api_of_each_connector() -> None:
    found = {(name.partition("/")[0], json.loads((FILES / name).read_text())["path"]) for name in NAMES}
    assert found == {(one.name, route) for one in CONNECTORS.values() for route in one.routes}
