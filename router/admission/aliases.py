"""Other names for models. The worker has to be sent the model's own, so the value in the body is replaced, and not a
byte else.

Where that value stands is found from the end, since of two the last counts: a ``"model": "alias"`` is the document's
own, and not one of something inside it, when what comes before it and ``"": 0}`` make a JSON object. A body that hides
the name behind escapes, or repeats it over and over inside, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from helios.decoding import from_json
from helios.errors import UsageError
from router import errors
from router.relay import fields
from router.relay.model_name import MODEL, PLACES, is_own


def check(aliases: Mapping[str, str]) -> None:
    """Raises UsageError for an alias of an alias, or without a name."""
    for alias, model in aliases.items():
        if not alias or not model:
            raise UsageError("router.aliases: an alias and its model need a name")
        if model in aliases:
            raise UsageError(f"router.aliases: {alias!r} means {model!r}, which is an alias itself")


def replaced(body: bytes, alias: str, model: str) -> bytes:
    """The body with its model's name replaced. Raises ApiError (400) where that can't be done safely."""
    new = msgspec.json.encode(model)
    for match in list(MODEL.finditer(body))[: -PLACES - 1 : -1]:
        if _text(match[1]) == alias and is_own(body[: match.start()]):
            changed = body[: match.start(1)] + new + body[match.end(1) :]
            if fields.read(changed).model == model:
                return changed
            break
    raise errors.alias_unclear(alias)


def _text(value: bytes) -> str | None:
    try:
        return from_json(value, str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
