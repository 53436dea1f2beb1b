"""Write the answers of a real vLLM into ``golden.json``: ``python -m tests.fakes.vllm.capture URL MODEL RUNNER``.

Run it once against ``vllm serve DIR --served-model-name MODEL --max-model-len 1024 --enable-scale-out`` (RUNNER
``generate``) and once with ``--runner pooling --convert embed`` instead of the last flag (RUNNER ``pooling``); each run
replaces its own cases. Long lists of numbers are cut, and the model's directory is left out.
"""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.fakes.vllm.cases import CASES, Case

GOLDEN = Path(__file__).with_name("golden.json")


def ask(url: str, case: Case, model: str) -> dict[str, Any]:
    """Send a case's request and return its answer: status, type, and JSON, events or text."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    try:
        body = case.content(model)
        headers = {"content-type": "application/json", "x-request-id": "golden", **case.headers}
        connection.request(case.method, case.path, body, headers)
        response = connection.getresponse()
        return decode(response.status, response.headers.get("content-type", ""), response.read())
    finally:
        connection.close()


def decode(status: int, content_type: str, body: bytes) -> dict[str, Any]:
    """An answer in the form kept in ``golden.json``."""
    kind = content_type.split(";")[0]
    answer: dict[str, Any] = {"status": status, "type": kind}
    if kind == "text/event-stream":
        answer["events"] = [event(block) for block in body.decode().split("\n\n") if block]
    elif kind == "application/json":
        answer["json"] = json.loads(body)
    else:
        answer["text"] = body.decode()
    tidied: dict[str, Any] = tidy(answer)
    return tidied


def tidy(value: Any) -> Any:
    """The answer without what says nothing about its shape: long vectors, the directory of the model."""
    if isinstance(value, dict):
        return {key: "{MODEL}" if key == "root" else tidy(item) for key, item in value.items()}
    if isinstance(value, list):
        numbers = all(isinstance(item, float) for item in value)
        return value[:4] if numbers else [tidy(item) for item in value]
    return value


def event(block: str) -> dict[str, Any]:
    """One server-sent event; its data is decoded where it is JSON."""
    fields = dict(line.split(": ", 1) for line in block.splitlines())
    if fields["data"] == "[DONE]":
        return fields
    return {**fields, "data": json.loads(fields["data"])}


def main(url: str, model: str, runner: str) -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for case in CASES:
        if case.runner == runner:
            golden[case.name] = ask(url, case, model)
    order = [case.name for case in CASES]
    golden = {name: golden[name] for name in sorted(golden.keys() & set(order), key=order.index)}
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
