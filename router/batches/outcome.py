"""What becomes of a request of a batch: whether it is asked again, and the line that is written of it.

    {"id": "batch_req_…", "custom_id": "a", "response": {"status_code", "request_id", "body"}, "error": null}

Successes go into the output file, all else into the error file; a request that was never answered has no ``response``
but an ``error`` with code and message.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helios.config import RetrySettings
from helios.decoding import converted, from_json
from router.batches.asking import Answer
from router.batches.records import Usage
from router.resilience.retry import STATUSES, repeatable
from router.routes import InferenceRoute

NOT_TAKEN: Final = (429, 503)
"""Nobody began it: it is asked again as long as the batch lasts."""
TRIES: Final = 3
"""How often a request is asked that somebody may have begun, where that is safe at all."""
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 60.0

EXPIRED: Final = "batch_expired", "This request could not be executed before the completion window expired."
CANCELLED: Final = "batch_cancelled", "The batch was cancelled before this request was executed."


class Result(msgspec.Struct, frozen=True):
    """A line of the output file (``good``) or the error file, with its end."""

    good: bool
    line: bytes
    usage: Usage = Usage()


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Of all of OpenAI's answers together."""

    prompt_tokens: int | None = None
    input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Answered(msgspec.Struct):
    usage: Any = None


def pause_s(route: InferenceRoute, answer: Answer, tries: int, settings: RetrySettings) -> float | None:
    """How long to wait before the request is asked again, in seconds; None: the answer counts.

    ``tries``: how often it was asked."""
    if answer.status in NOT_TAKEN:
        pass
    elif (failure := STATUSES.get(answer.status)) is None or not repeatable(route, failure, settings) or tries >= TRIES:
        return None
    own = FIRST_PAUSE_S * 2.0 ** min(tries - 1, 10)
    return min(LONGEST_PAUSE_S, max(answer.retry_after_s or 0.0, own))


def answered(identity: str, custom_id: str, answer: Answer) -> Result:
    """The line of an answer."""
    try:
        content = from_json(answer.body, _Answered)
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = f"The answer with the status {answer.status} is no JSON object."
        return unanswered(identity, custom_id, "invalid_answer", message)
    # JSON has line ends between its tokens only, so they may be blanks.
    body = msgspec.Raw(answer.body.replace(b"\n", b" ").replace(b"\r", b" "))
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": body}
    good = 200 <= answer.status < 300
    line = {"id": identity, "custom_id": custom_id, "response": response, "error": None}
    return Result(good, msgspec.json.encode(line) + b"\n", _used(content.usage) if good else Usage())


def unanswered(identity: str, custom_id: str, code: str, message: str) -> Result:
    """The line of a request without an answer."""
    error = {"code": code, "message": message}
    line = {"id": identity, "custom_id": custom_id, "response": None, "error": error}
    return Result(False, msgspec.json.encode(line) + b"\n")


def _used(content: Any) -> Usage:
    try:
        usage = converted(content or {}, _Usage)
    except msgspec.ValidationError:
        return Usage()
    into, out = usage.prompt_tokens_details or usage.input_tokens_details, usage.completion_tokens_details
    out = out or usage.output_tokens_details
    return Usage(
        usage.prompt_tokens or usage.input_tokens or 0, (into and into.cached_tokens) or 0,
        usage.completion_tokens or usage.output_tokens or 0, (out and out.reasoning_tokens) or 0,
    )  # fmt: skip
