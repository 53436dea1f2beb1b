"""Asking a worker of this home, over its front's unix socket."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Final

from helios.errors import HeliosError
from helios.http.client import HttpClient

WAIT_S: Final = 24 * 3600.0
"""The worker's own deadline is shorter."""
ANSWER_MAX: Final = 1 << 16


def drained(path: Path) -> dict[str, Any]:
    """Have it drain and wait for that: ``drained``, ``cut`` (requests that were cut off) and ``why``.

    Raises Unavailable where it ends meanwhile without an answer, HeliosError for an answer that is none."""
    with contextlib.closing(HttpClient(f"unix:{path}", timeout_s=WAIT_S)) as client:
        with client.request("POST", "/drain") as response:
            content = response.read(ANSWER_MAX)
    try:
        answer = json.loads(content)
        return {"drained": bool(answer["drained"]), "cut": int(answer["cut"]), "why": str(answer["why"])}
    except (ValueError, KeyError, TypeError):
        raise HeliosError(f"the worker answered {response.status}: {content[:200].decode(errors='replace')}") from None
