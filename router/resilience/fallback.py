"""Fallbacks: what serves a model's requests when none of its workers can, by configuration.

A model has a list of targets, which are tried in order: another model of this router, or another endpoint that speaks
OpenAI's API, such as a cloud's.

- Rewritten: the field ``model`` of the body, and fields in ``drop`` are left out; all other values stay byte for byte.
  The answer goes on as it came, with the name of the model that made it; ``X-Helios-Fallback`` says which.
- An endpoint gets ``Accept``, ``Accept-Encoding`` and ``Content-Type`` of the client's headers, the request id, the
  trace, and its own key. Nothing else: no ``Authorization``, cookies or query of the client leave this router. Of its
  answer cookies and its own request id stay here.
- Only JSON is rewritten, so forms (audio) have no fallback. There are no fallbacks of fallbacks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Raw

from helios.config import FallbackRule, FallbackTarget
from helios.decoding import json_decoder
from helios.errors import UsageError
from router.resilience.guard import Guard
from router.routes import ROUTES, InferenceRoute
from router.workers import Worker, Workers, address_of

if TYPE_CHECKING:
    from router.relay.framing import Head
    from router.relay.request_head import RequestHead

PASSED: Final = frozenset({b"accept", b"accept-encoding", b"content-type"})
"""Headers of a client that an endpoint gets."""
_fields = json_decoder(dict[str, Raw])


def rewritten(body: bytes, model: str, drop: Collection[str] = ()) -> bytes:
    """The JSON object with another ``model`` and without some fields. Raises msgspec.DecodeError for anything else."""
    fields = _fields.decode(body)
    fields["model"] = Raw(msgspec.json.encode(model))
    for name in drop:
        fields.pop(name, None)
    return msgspec.json.encode(fields)


class Endpoint:
    """An OpenAI-compatible endpoint that is no worker. Raises UsageError."""

    ours = False

    __slots__ = ("_authorization", "address", "guard", "url")

    def __init__(self, target: FallbackTarget, guard: Guard, environ: Mapping[str, str]) -> None:
        self.url = _checked(target.url)
        self.address = address_of(self.url)
        self.guard = guard
        key = read_key(target.key_file, target.key_env, f"the fallback {self.url}", environ)
        self._authorization = b"authorization: Bearer %b\r\n" % key if key else b""

    def head(self, said: RequestHead, size: int) -> bytes:
        """The head of a request to it, whose body has ``size`` bytes."""
        passed = b"".join(b"%b: %b\r\n" % (name, value) for name, value in said.headers if name in PASSED)
        path = self.address.prefix + said.route.raw_path.removeprefix(b"/v1")
        return (
            b"POST %b HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\ntraceparent: %b\r\n%b%b\r\n"
            % (path, self.address.authority, size, said.identity, said.trace.parent, self._authorization, passed)
        )


class Target:
    """One fallback of a model."""

    __slots__ = ("_drop", "_label", "endpoint", "model", "routes")

    def __init__(self, settings: FallbackTarget, endpoint: Endpoint | None) -> None:
        self.model, self.endpoint, self.routes = settings.model, endpoint, frozenset(settings.routes)
        self._drop = settings.drop
        self._label = quote(settings.model, safe="/:@.-_+ ").encode()

    @property
    def name(self) -> str:
        """For logs and metrics."""
        return self.model if self.endpoint is None else f"{self.model} at {self.endpoint.url}"

    def body(self, content: bytes) -> bytes:
        """A request's body for it. Raises msgspec.DecodeError."""
        return rewritten(content, self.model, self._drop)

    def mark(self, head: Head) -> None:
        """Say in an answer's head where it comes from."""
        if self.endpoint is not None:
            private = (b"set-cookie:", b"x-request-id:")
            head.lines = [line for line in head.lines if not line.lower().startswith(private)]
            head.identified = False
        head.lines.append(b"x-helios-fallback: " + self._label)

    def able(self, workers: Workers, tried: Collection[Worker]) -> bool:
        """Whether it can serve a request now."""
        if self.endpoint is not None:
            return not self.endpoint.guard.bad
        return not poor(workers.candidates(self.model, tried))


def poor(candidates: Sequence[Worker]) -> bool:
    """Whether a fallback would be better than these: there are none, or only such as most likely can't serve."""
    return not candidates or candidates[0].guard.bad


class Fallbacks:
    """The configured ones. Raises UsageError."""

    def __init__(
        self, rules: Sequence[FallbackRule], guard: Callable[[str], Guard], environ: Mapping[str, str] = os.environ
    ) -> None:
        self._targets: dict[str, list[Target]] = {}
        self.endpoints: list[Endpoint] = []
        for rule in rules:
            if rule.model in self._targets:
                raise UsageError(f"router.fallbacks names the model {rule.model!r} twice")
            self._targets[rule.model] = [self._target(rule.model, one, guard, environ) for one in rule.to]

    def _target(
        self, model: str, settings: FallbackTarget, guard: Callable[[str], Guard], environ: Mapping[str, str]
    ) -> Target:
        if not settings.url:
            if settings.model == model:
                raise UsageError(f"the model {model!r} is its own fallback")
            if settings.key_file or settings.key_env or settings.drop:
                raise UsageError(f"the fallback {settings.model!r} of {model!r} has a key or drop, but no url")
            return Target(settings, None)
        served = {route.path for route in ROUTES if route.body == "json" and route.path.startswith("/v1/")}
        if wrong := [path for path in settings.routes if path not in served]:
            raise UsageError(
                f"a fallback's endpoint can't serve {', '.join(wrong)}", hint=f"Known: {', '.join(sorted(served))}."
            )
        endpoint = Endpoint(settings, guard(settings.url), environ)
        self.endpoints.append(endpoint)
        return Target(settings, endpoint)

    def of(self, model: str, route: InferenceRoute) -> list[Target]:
        """The targets for a request, in order; a list of its own."""
        if route.body != "json":
            return []
        return [one for one in self._targets.get(model, ()) if one.endpoint is None or route.path in one.routes]


def read_key(file: str, env: str, whose: str, environ: Mapping[str, str]) -> bytes:
    """An API key from a file or the environment, or nothing. Raises UsageError, which does not show it."""
    if file and env:
        raise UsageError(f"the key of {whose} has both key_file and key_env")
    if not (file or env):
        return b""
    try:
        key = (Path(file).read_text() if file else environ.get(env, "")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the key of {whose} can't be read from {file}: {type(error).__name__}") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{file or env} holds no key for {whose}", hint="A key is one line of visible ASCII.")
    return key.encode()


def _checked(text: str) -> str:
    """An endpoint's base URL without a final slash; raises UsageError."""
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(f"{text!r} is not an endpoint's URL", hint="Write https://HOST/v1, as OpenAI's clients do.")
    if parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        raise UsageError(f"an endpoint's URL has no query, fragment or credentials: {parts.hostname}")
    path = parts.path.rstrip("/")
    if not path.isascii() or any(letter.isspace() for letter in text):
        raise UsageError(f"{text!r} is not an endpoint's URL: its path needs percent-encoding")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"
