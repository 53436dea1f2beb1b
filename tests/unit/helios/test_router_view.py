"""What ``helios router top`` shows fits the terminal and begins with what needs somebody."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from helios.cli.router_view import router_view
from router.scheduling.configured import explained

POLICY = explained("prefix-cache")
COMBINED = explained({"scorers": ["queue-depth", "least-requests"], "picker": "power-of-two"})


def worker(number: int, **more: Any) -> dict[str, Any]:
    one = {
        "id": f"10.0.0.{number}:8000", "url": f"http://10.0.0.{number}:8000", "models": ["org/" + "long-name-" * 8],
        "adapters": ["adapter"], "role": "decode", "revision": "0123456789abcdef", "weight": 2.5, "health": "up",
        "reason": None, "since_s": 1.0, "in_flight": number, "cordoned": False,
        "unready": False, "draining": False, "breaker": "closed", "ejected_s": None, "lease_s": 12.3,
    }  # fmt: skip
    return one | more


def publisher(number: int) -> dict[str, Any]:
    lost = number > 3
    return {
        "worker": f"http://10.0.0.{number}:8000", "endpoint": f"tcp://10.0.0.{number}:5557", "replay": None,
        "connected": number % 2 == 0, "followed": not lost, "blocks": 1000 * number, "behind": 0, "lag_s": 0.012,
        "gaps": number,
    }  # fmt: skip


def state(count: int = 40) -> dict[str, Any]:
    down = worker(200, health="down", reason="the connection was refused", in_flight=0, models=["m"])
    leaving = worker(201, draining=True, cordoned=True, lease_s=None)
    models = [
        {"model": f"org/model-{n}", "workers": 3, "up": n % 4, "cordoned": 0, "in_flight": n} for n in range(count)
    ]
    awaited = {"model": "org/awaited", "phase": "fetching", "done": 12e9, "total": 48e9, "reason": "it is large"}
    return {
        "status": "ready", "uptime_s": 7200.0, "policy": POLICY,
        "workers": [worker(n) for n in range(count)] + [down, leaving],
        "models": models, "awaited": [awaited | {"retry_after_s": 5, "waited_s": 65.0}],
        "index": {"blocks": 1234567, "max_blocks": 2 << 20, "publishers": [*map(publisher, range(9))], "shared": []},
    }  # fmt: skip


def shown(document: dict[str, Any], width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(router_view(document, "http://router:8481", width, height))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 24), (120, 40), (200, 60)])
def test_it_fits_and_what_is_down_comes_first(width, height):
    lines = shown(state(), width, height)
    assert len(lines) <= height
    assert all(len(line.rstrip()) <= width for line in lines)
    text = "\n".join(lines)
    assert "40/41 up" in text
    assert width < 120 or lines[0].endswith("  prefix-cache")
    at = next(number for number, line in enumerate(lines) if line.startswith("WORKER"))
    assert "down" in lines[at + 1]
    assert "cordoned draining" in text or width < 110
    assert "more" in lines[-1]
    assert "fetching" in text
    assert "12.0 GB of 48.0 GB" in text
    assert "1,234,567 of 2,097,152 blocks  followed 4/9" in text
    assert "lag 12 ms  gaps 36" in text or width < 80
    assert ("no connection" in text and "and 2 more" in text) is (height > 24)


def test_what_is_held_against_a_worker_is_shown_and_comes_first():
    document = state()
    document["workers"] += [worker(202, breaker="half_open"), worker(203, ejected_s=29.7), worker(204, breaker="open")]
    lines = shown(document, 160, 60)
    at = next(number for number, line in enumerate(lines) if line.startswith("WORKER"))
    assert "up breaker open " in lines[at + 1]
    assert "up ejected 30 s" in lines[at + 2]
    assert "up breaker half open" in lines[at + 3]
    assert "down" in lines[at + 4]


def test_a_router_without_anything_is_shown():
    empty = {
        "status": "draining",
        "uptime_s": 1.0,
        "policy": COMBINED,
        "workers": [],
        "models": [],
        "awaited": [],
        "index": None,
    }
    assert "0/0 up" in shown(empty, 80, 24)[0]
    assert "draining" in shown(empty, 80, 24)[0]
    assert "queue-depth + least-requests + power-of-two" in shown(empty, 160, 24)[0]
