"""vLLM's errors: ``{"error": {"message", "type", "param", "code"}}``, and Anthropic's form for its routes."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import msgspec


class VllmError(Exception):
    """A request that vLLM refuses. ``type`` defaults to vLLM's name for a bad request."""

    def __init__(
        self, message: str, *, status: int = 400, type: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type, self.param = message, status, type, param

    def openai(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}

    def anthropic(self) -> dict[str, Any]:
        if self.type == HTTPStatus(self.status).phrase:  # refused by FastAPI, before the route could translate it
            return self.openai()
        return {"type": "error", "error": {"type": self.type, "message": self.message}}


def no_such_model(name: str, served: str) -> VllmError:
    message = f"The model `{name}` does not exist. Valid aliases: {served}."
    return VllmError(message, status=404, type="NotFoundError", param="model")


def from_validation(error: msgspec.DecodeError) -> VllmError:
    """The error FastAPI makes of a body that does not fit."""
    text = str(error)
    found = re.search(r"missing required field `(\w+)`", text) or re.search(r"at `\$\.?([\w.]*)", text)
    param = "body" if found is None else f"body.{found[1]}".rstrip(".")
    return VllmError(f"1 validation error:\n  {text}", type="Bad Request", param=param)
