"""Patches of JSON documents: RFC 6902 (JSON patch) and RFC 7386 (merge patch)."""

from __future__ import annotations

import re
from typing import Any

from tests.fakes.kubernetes.errors import Refusal
from tests.fakes.kubernetes.store import copied


def json_patch(document: Any, operations: list[dict[str, Any]]) -> Any:
    """The document after ``test``, ``add``, ``replace`` and ``remove``: all of them, or Refusal (422)."""
    document = copied(document)
    for each in operations:
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in each["path"].split("/")[1:])
        at: Any = document
        try:
            for part in parents:
                at = at[int(part)] if isinstance(at, list) else at[part]
            if each["op"] == "add" and isinstance(at, list):
                at.insert(len(at) if last == "-" else int(last), each["value"])
                continue
            place: Any = int(last) if isinstance(at, list) else last
            if each["op"] == "test":
                if at[place] != each["value"]:
                    raise Refusal(422, "Invalid", f"testing value {each['path']} failed")
            elif each["op"] == "remove":
                del at[place]
            elif each["op"] in ("add", "replace"):
                if each["op"] == "replace":
                    _ = at[place]  # it must be there
                at[place] = each["value"]
            else:
                raise Refusal(400, "BadRequest", f"no operation: {each['op']}")
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise Refusal(422, "Invalid", f"{each['path']}: {error!r}") from None
    return document


def merge_patch(document: Any, patch: Any) -> Any:
    """``patch`` laid over the document; null removes."""
    if not isinstance(patch, dict):
        return copied(patch)
    found = dict(document) if isinstance(document, dict) else {}
    for name, one in patch.items():
        if one is None:
            found.pop(name, None)
        else:
            found[name] = merge_patch(found.get(name), one)
    return found


def yaml_like(content: bytes) -> None:
    """What is applied is read as YAML, by which not all JSON can be read: Refusal (400), as Kubernetes 1.36 says it."""
    if re.search(rb"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]", content):
        raise _no_yaml("found invalid Unicode character escape code")
    if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]", content.decode()):
        raise _no_yaml("control characters are not allowed")


def _no_yaml(why: str) -> Refusal:
    return Refusal(400, "BadRequest", f"error decoding YAML: error converting YAML to JSON: yaml: {why}")
