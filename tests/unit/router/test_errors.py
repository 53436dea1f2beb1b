"""Errors in each dialect."""

from __future__ import annotations

import json

import pytest

from router import errors
from router.errors import ANTHROPIC, OPENAI, RESPONSES, ApiError

ALL = [
    errors.unknown_path("GET", "/x"), errors.method_not_allowed("GET", "/x", "POST"), errors.unknown_model(None, ["a"]),
    errors.unknown_model("x" * 5000, ["a", "b"]), errors.invalid_body("x"), errors.forbidden_field("kv"),
    errors.too_large(2**20), errors.body_timeout(1.5), errors.content_encoding("gzip"), errors.overloaded(2**30),
    errors.no_space(), errors.no_worker("m", "why", 2), errors.shutting_down(), errors.worker_lost("why"),
    errors.bad_answer("why"), errors.first_byte_timeout(600), errors.idle_timeout(120), errors.internal(),
]  # fmt: skip


@pytest.mark.parametrize("error", ALL, ids=lambda e: e.code)
def test_every_error_has_its_form_in_every_dialect(error: ApiError) -> None:
    body = json.loads(OPENAI.body(error, "id"))
    assert body == {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    }  # fmt: skip
    assert OPENAI.event(error, "id") == b"data: " + OPENAI.body(error, "id") + b"\n\n"
    anthropic = json.loads(ANTHROPIC.body(error, "id"))
    assert anthropic == {
        "type": "error",
        "error": {"type": anthropic["error"]["type"], "message": error.message},
        "request_id": "id",
    }
    assert ANTHROPIC.event(error, "id").startswith(b"event: error\ndata: {")
    name, data, *rest = RESPONSES.event(error, "id").split(b"\n")
    assert (name, rest) == (b"event: error", [b"", b""])
    event = json.loads(data.removeprefix(b"data: "))
    assert (event["type"], event["message"], event["error"]) == ("error", error.message, body["error"])
    assert len(error.message) < 400
    assert 400 <= error.status < 600
    assert (error.retry_after_s is not None) == (error.status == 503)
