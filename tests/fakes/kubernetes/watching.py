"""What a watch tells of changes, and label selectors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.fakes.kubernetes.store import Change, copied

Fits = Callable[[dict[str, Any]], bool]


def seen_as(change: Change, resource: str, namespace: str, fits: Fits) -> bytes | None:
    """The event that a change is for a watch; an empty namespace: all."""
    if change.resource != resource:
        return None
    before, after = (
        one if one is not None and namespace in ("", one["metadata"].get("namespace", "")) and fits(one) else None
        for one in (change.before, change.after)
    )
    if after is not None:
        return line("ADDED" if before is None else "MODIFIED", after)
    if before is None:
        return None
    last = copied(before)
    last["metadata"]["resourceVersion"] = str(change.version)
    return line("DELETED", last)


def line(kind: str, one: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": one}).encode() + b"\n"


def selector(text: str) -> Fits:
    """A label selector: ``a=b``, ``a==b``, ``a!=b``, ``a in (b,c)``, ``a``, ``!a``, with commas between."""
    terms = [term.strip() for term in re.findall(r"(?:[^,(]|\([^)]*\))+", text)]

    def fits(one: dict[str, Any]) -> bool:
        labels = one["metadata"].get("labels") or {}
        for term in terms:
            if found := re.fullmatch(r"(\S+)\s+in\s+\(([^)]*)\)", term):
                good = labels.get(found[1]) in [v.strip() for v in found[2].split(",")]
            elif found := re.fullmatch(r"([^=!]+)(!=|==?)([^=]*)", term):
                good = (labels.get(found[1]) == found[3]) != (found[2] == "!=")
            else:
                good = (term.lstrip("!") in labels) != term.startswith("!")
            if not good:
                return False
        return True

    return fits
