"""Whether a server answers as the real vLLM did from which ``golden.json`` was captured: the fake, or a real one."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from tests.fakes.vllm.capture import GOLDEN, ask
from tests.fakes.vllm.cases import CASES


def differences(url: str, model: str, runner: str, leave_out: Collection[str] = ()) -> list[str]:
    """The cases of a runner (``generate`` or ``pooling``) in which the server answers otherwise, with both answers."""
    golden = json.loads(GOLDEN.read_text())
    found = []
    for case in CASES:
        if case.runner == runner and case.name not in leave_out:
            given, wanted = outline(ask(url, case, model)), outline(golden[case.name])
            if given != wanted:
                found.append(f"{case.name}:\n  given  {json.dumps(given)}\n  wanted {json.dumps(wanted)}")
    return found


def outline(answer: dict[str, Any]) -> dict[str, Any]:
    """What of an answer must be the same: status, type, structure, and what a program reads of an error."""
    content = answer.get("json")
    error = content.get("error", {}) if isinstance(content, dict) else {}
    param = error.get("param") or ""
    return {
        "status": answer["status"],
        "type": answer["type"],
        "shape": shape(answer),
        # The position inside broken JSON (body.9) is the parser's affair.
        "error": [error.get("type"), error.get("code"), "body" if param.removeprefix("body.").isdigit() else param],
    }


def shape(value: Any) -> Any:
    """A value's structure: keys, types, and the shape of each different element of a list."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        shapes: list[Any] = []
        for item in map(shape, value):
            if item not in shapes:
                shapes.append(item)
        return shapes
    return type(value).__name__
