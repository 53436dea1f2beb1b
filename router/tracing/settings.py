"""What ``router.tracing`` may say."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from helios.config import TracingSettings
from helios.errors import UsageError

PATH: Final = "/v1/traces"


def check(settings: TracingSettings) -> None:
    """Raises UsageError for settings that can't work."""
    if not settings.endpoint:
        return
    endpoint_of(settings)
    if not 0 <= settings.ratio <= 1:
        raise UsageError(f"router.tracing.ratio must be between 0 and 1, not {settings.ratio}")
    for name in ("queue", "interval_s", "timeout_s"):
        if getattr(settings, name) <= 0:
            raise UsageError(f"router.tracing.{name} must be more than 0, not {getattr(settings, name)}")


def endpoint_of(settings: TracingSettings) -> str:
    """Where spans go. Raises UsageError."""
    url = urlsplit(settings.endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UsageError(
            f"router.tracing.endpoint: {settings.endpoint!r} is no URL of a collector",
            hint="Write http://HOST:4318, where it takes OTLP over HTTP.",
        )
    return settings.endpoint if url.path.strip("/") else settings.endpoint.rstrip("/") + PATH
