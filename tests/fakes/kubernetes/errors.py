"""metav1.Status: what the API server answers when it refuses."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """``status`` is the HTTP status."""

    def __init__(
        self, status: int, reason: str, message: str, *, causes: list[tuple[str, str]] | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after
        self.causes = causes or []

    def body(self) -> dict[str, Any]:
        details: dict[str, Any] = {}
        if self.causes:
            details["causes"] = [{"reason": "FieldValueInvalid", "field": f, "message": m} for f, m in self.causes]
        if self.retry_after is not None:
            details["retryAfterSeconds"] = self.retry_after
        return {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": self.status,
            "reason": self.reason, "message": self.message, **({"details": details} if details else {}),
        }  # fmt: skip


def invalid(kind: str, name: str, causes: list[tuple[str, str]]) -> Refusal:
    """422, in the words of apimachinery's NewInvalid: each cause is a field and what is wrong with it."""
    listed = [f"{field}: {message}" if field else message for field, message in causes]
    text = listed[0] if len(listed) == 1 else f"[{', '.join(listed)}]"
    return Refusal(422, "Invalid", f'{kind} "{name}" is invalid: {text}', causes=causes)


def not_found(resource: str, name: str) -> Refusal:
    return Refusal(404, "NotFound", f'{resource} "{name}" not found')


def conflict(resource: str, name: str, why: str) -> Refusal:
    return Refusal(409, "Conflict", f'Operation cannot be fulfilled on {resource} "{name}": {why}')
