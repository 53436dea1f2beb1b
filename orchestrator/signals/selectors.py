"""Label selectors of external metrics, and quantities, as Kubernetes writes them."""

from __future__ import annotations

import re
from typing import Final

from helios.errors import InvalidInput

KEYS: Final = ("service", "role", "revision")
MOST: Final = 4096
"""Longest selector, in characters."""
_KEY: Final = r"(?P<key>[A-Za-z0-9](?:[-A-Za-z0-9_./]{0,315}[A-Za-z0-9])?)"
_VALUE: Final = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_REQUIREMENT: Final = re.compile(
    rf"\s*{_KEY}\s*(?:(?:==?)\s*(?P<value>{_VALUE})|\bin\s*\(\s*(?P<only>{_VALUE})\s*\))\s*\Z"
)


def selected(text: str) -> dict[str, str]:
    """What a selector says of each of ``KEYS``. Raises InvalidInput.

    Equality alone is meant (``a=b``, ``a==b``, ``a in (b)``): a metric is of one service.
    """
    if len(text) > MOST:
        raise InvalidInput(f"the label selector has more than {MOST} characters")
    found: dict[str, str] = {}
    for part in _parts(text):
        matched = _REQUIREMENT.match(part)
        if matched is None:
            raise InvalidInput(
                f"the label selector's {part.strip()[:80]!r} can't be used: key=value and key in (value) can"
            )
        key, value = matched["key"], matched["value"] or matched["only"]
        if key not in KEYS:
            raise InvalidInput(f"the label {key[:80]!r} is unknown; known: {', '.join(KEYS)}")
        if found.setdefault(key, value) != value:
            raise InvalidInput(f"the label selector wants {key}={found[key]} and {key}={value}")
    if "service" not in found:
        raise InvalidInput("the label selector has to name an InferenceService: service=NAME")
    return found


def _parts(text: str) -> list[str]:
    """Between commas that stand in no parentheses."""
    parts, depth, last = [], 0, 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "," and not depth:
            parts.append(text[last:index])
            last = index + 1
    return [*parts, text[last:]] if text.strip() else []


def quantity(value: float) -> str:
    """A number, not negative, as a quantity (k8s.io/apimachinery, pkg/api/resource): whole, or in thousandths."""
    thousandths = round(value * 1000)
    return str(thousandths // 1000) if thousandths % 1000 == 0 else f"{thousandths}m"
