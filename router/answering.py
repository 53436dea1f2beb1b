"""Answers of the Starlette application that are errors, in OpenAI's form."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from router.entrance import IDENTITY
from router.errors import OPENAI, ApiError


def refusal(request: Request, error: ApiError) -> Response:
    """The answer to a request that ends with this error."""
    identity = request.scope[IDENTITY].decode()
    extra = {"x-request-id": identity}
    if error.allow is not None:
        extra["allow"] = error.allow
    if error.challenge is not None:
        extra["www-authenticate"] = error.challenge
    if error.retry_after_s is not None:
        extra["retry-after"] = str(error.retry_after_s)
    return Response(OPENAI.body(error, identity), error.status, extra, "application/json")
