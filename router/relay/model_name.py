"""Where the model's name stands in a JSON document, so that it alone is replaced, and not a byte else.

A ``"model": "…"`` belongs to the document itself, and not to something inside it, when what comes before it makes a
JSON object with ``"": 0}`` behind it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

import msgspec

from helios.decoding import json_decoder

PLACES: Final = 16
"""Places that are looked at: each costs reading what is before it."""
MODEL: Final = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.){0,4096}")')
"""Group 1 is the value. It is bounded, so that a place that goes on for long is not read again and again."""

_object = json_decoder(dict[str, msgspec.Raw])


def is_own(before: bytes, inside: Collection[str] = ()) -> bool:
    """Whether a field behind these bytes is the document's, or one of an object under one of these names in it."""
    if _fields(before + b'"":0}') is not None:
        return True
    if not inside:
        return False
    fields = _fields(before + b'"":0}}')
    return fields is not None and next(reversed(fields)) in inside


def _fields(document: bytes) -> dict[str, msgspec.Raw] | None:
    try:
        return _object.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
