"""The collector of spans, over OTLP/HTTP: blocking, for one thread at a time.

As OTLP's specification has it: 2xx is taken; after 429, 502, 503, 504 and without an answer the same is sent again, in
the pauses that ``Retry-After`` says or else twice as long each time, for so long in all; any other status is final.
What OpenTelemetry's exporters read of the environment counts here, too, each variable also with ``_TRACES`` before its
last part, which then wins: OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE, _CLIENT_CERTIFICATE, _CLIENT_KEY, _COMPRESSION.
"""

from __future__ import annotations

import gzip
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

from helios.errors import UsageError

AGAIN: Final = frozenset({429, 502, 503, 504})
FIRST_PAUSE_S: Final = 1.0
_PREFIX: Final = "OTEL_EXPORTER_OTLP_"
_PROTOBUF: Final = "application/x-protobuf"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Spans go where they were told to go."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


class Collector:
    """Raises UsageError for what the environment says and can't be."""

    def __init__(self, url: str, timeout_s: float, environ: Mapping[str, str] = os.environ) -> None:
        """``timeout_s``: longest that sending something takes, tries and pauses together."""
        self._url, self._timeout_s = url, timeout_s
        self._headers = {"content-type": _PROTOBUF, **pairs_of(_said(environ, "HEADERS"))}
        self._gzip = _said(environ, "COMPRESSION") == "gzip"
        if self._gzip:
            self._headers["content-encoding"] = "gzip"
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urlsplit(url).scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=_tls(environ)))
        self._opener = urllib.request.build_opener(*handlers)
        self._closed = threading.Event()

    def close(self) -> None:
        """End the pauses between tries; what is sent from now on is tried once."""
        self._closed.set()

    def send(self, body: bytes) -> bool:
        """Whether it was taken."""
        content = gzip.compress(body, 1) if self._gzip else body
        end, pause_s = time.monotonic() + self._timeout_s, FIRST_PAUSE_S
        while True:
            status, after_s = self._try(content, max(0.1, end - time.monotonic()))
            if 200 <= status < 300:
                return True
            if status and status not in AGAIN:
                return False
            wait_s = after_s or pause_s * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
            pause_s *= 2
            if time.monotonic() + wait_s >= end or self._closed.wait(wait_s):
                return False

    def _try(self, content: bytes, timeout_s: float) -> tuple[int, float]:
        """The status, 0 where there is none, and in how many seconds to come again, 0 where it does not say."""
        request = urllib.request.Request(self._url, content, self._headers)  # noqa: S310 - http or https (settings)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                answer.read(1 << 16)
                return int(answer.status), 0.0
        except urllib.error.HTTPError as error:
            with error:
                text = error.headers.get("retry-after", "")
                return error.code, float(text) if text.isdecimal() else 0.0
        except (OSError, ValueError, urllib.error.URLError):
            return 0, 0.0


def pairs_of(text: str) -> dict[str, str]:
    """``key=value,key=value``, percent-encoded, as W3C's baggage has it; what is no pair is left out."""
    pairs = [one.partition("=") for one in text.split(",")]
    return {unquote(key.strip()): unquote(value.strip()) for key, equals, value in pairs if equals and key.strip()}


def _said(environ: Mapping[str, str], name: str) -> str:
    return environ.get(f"{_PREFIX}TRACES_{name}") or environ.get(f"{_PREFIX}{name}", "")


def _tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    authorities, own = _said(environ, "CERTIFICATE"), _said(environ, "CLIENT_CERTIFICATE")
    try:
        context = ssl.create_default_context(cafile=authorities or None)
        if own:
            context.load_cert_chain(own, _said(environ, "CLIENT_KEY") or None)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"the certificates that {_PREFIX}CERTIFICATE and others name can't be used: {error}") from None
    return context
