"""Fallbacks: what a request becomes for another model or endpoint, and what the configuration may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import FallbackRule, FallbackTarget
from helios.errors import UsageError
from router.relay.request_head import RequestHead
from router.resilience.fallback import Fallbacks, rewritten
from router.resilience.guard import Guard
from router.routes import RAW_ROUTES

CHAT, AUDIO = RAW_ROUTES[b"/v1/chat/completions"], RAW_ROUTES[b"/v1/audio/transcriptions"]
JSON = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.text()), st.just({"a": [{}]}))


def fallbacks(*targets: FallbackTarget, environ: dict[str, str] | None = None) -> Fallbacks:
    return Fallbacks([FallbackRule(model="m", to=list(targets))], Guard, environ or {})


@given(st.dictionaries(st.sampled_from(["a", "model", "dropped", '"ü\\']) | st.text(), JSON))
def test_only_the_model_is_rewritten(fields: dict[str, Any]) -> None:
    body = json.dumps({**fields, "model": "m"}, ensure_ascii=True).encode()
    sent = rewritten(body, "other", ["dropped"])
    expected = {**fields, "model": "other"}
    expected.pop("dropped", None)
    assert json.loads(sent) == expected


def test_values_stay_as_they_were_written() -> None:
    body = rb'{"seed": 1.0e0, "model":"m", "big": 123456789012345678901234567890, "s": "\u00e4", "model": "m"}'
    sent = rewritten(body, "ü")
    for kept in (b"1.0e0", b"123456789012345678901234567890", rb"\u00e4", '"ü"'.encode()):
        assert kept in sent
    assert sent.count(b'"model"') == 1
    with pytest.raises(msgspec.DecodeError):
        rewritten(b"[]", "x")


def test_an_endpoint_gets_its_own_key_and_nothing_of_the_client() -> None:
    target = FallbackTarget(model="gpt", url="https://api.example.com/openai/v1/", key_env="KEY")
    (found,) = fallbacks(target, environ={"KEY": "secret\n"}).of("m", CHAT)
    assert found.endpoint is not None
    raw = [
        (b"authorization", b"Bearer client"), (b"cookie", b"c=1"), (b"x-api-key", b"k"),
        (b"x-forwarded-for", b"1.2.3.4"), (b"tracestate", b"a=b"), (b"baggage", b"user=1"), (b"accept", b"*/*"),
        (b"content-type", b"application/json"), (b"x-request-id", b"id-1"),
        (b"traceparent", b"00-%b-%b-01" % (b"a" * 32, b"c" * 16)),
    ]  # fmt: skip
    said = RequestHead(CHAT, b"a=1", raw, lambda count: 11)
    assert found.endpoint.head(said, 12) == (
        b"POST /openai/v1/chat/completions HTTP/1.1\r\nhost: api.example.com\r\ncontent-length: 12\r\n"
        b"x-request-id: id-1\r\ntraceparent: 00-%b-%b-01\r\nauthorization: Bearer secret\r\n"
        b"accept: */*\r\ncontent-type: application/json\r\n\r\n" % (b"a" * 32, b"000000000000000b")
    )
    address = found.endpoint.address
    assert (address.host, address.port, address.tls) == ("api.example.com", 443, True)


def test_targets_in_order_where_they_serve_the_route(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    cloud = FallbackTarget(model="gpt", url="http://h/v1", routes=["/v1/embeddings"], key_file=str(tmp_path / "key"))
    configured = fallbacks(FallbackTarget(model="small"), cloud)
    assert [one.name for one in configured.of("m", CHAT)] == ["small"]
    embeddings = RAW_ROUTES[b"/v1/embeddings"]
    assert [one.name for one in configured.of("m", embeddings)] == ["small", "gpt at http://h/v1"]
    assert configured.of("m", AUDIO) == []
    assert configured.of("other", CHAT) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "m"}, "its own fallback"),
        ({"model": "x", "key_env": "K"}, "but no url"),
        ({"model": "x", "url": "api.example.com"}, "is not an endpoint's URL"),
        ({"model": "x", "url": "https://u:p@h/v1"}, "credentials"),
        ({"model": "x", "url": "https://h/v1?key=1"}, "no query"),
        ({"model": "x", "url": "https://h/a b"}, "percent-encoding"),
        ({"model": "x", "url": "https://h/v1", "routes": ["/tokenize"]}, "can't serve /tokenize"),
        ({"model": "x", "url": "https://h/v1", "key_env": "K", "key_file": "f"}, "both"),
        ({"model": "x", "url": "https://h/v1", "key_env": "MISSING"}, "holds no key"),
        ({"model": "x", "url": "https://h/v1", "key_env": "TWO_LINES"}, "holds no key"),
        ({"model": "x", "url": "https://h/v1", "key_file": "/does/not/exist"}, "can't be read"),
    ],
)
def test_wrong_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        fallbacks(FallbackTarget(**fields), environ={"TWO_LINES": "s3cret\nx: y", "K": "s3cret"})
    assert "s3cret" not in str(raised.value)
