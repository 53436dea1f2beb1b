"""What ``helios status`` shows of a mount fits the terminal: names are cut, numbers are not."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from helios.cli.view import MOST, mount_view, time_left

LONG = "an-organisation-with-a-name/" + "a-model-with-a-very-long-name-" * 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def activity() -> dict[str, Any]:
    shares = {"total": {"l1": 5, "hit_ratio": 0.9871}, "minute": {"l1": 0, "hit_ratio": None}}
    model = {
        "repo": f"models/{LONG}",
        "commit": COMMIT,
        "refs": ["main"],
        "files": 1234,
        "local_files": 1000,
        "volume": True,
    }
    fill = {
        "repo": f"models/{LONG}",
        "commit": COMMIT,
        "path": "model-00001-of-00191.safetensors" * 3,
        "sha256": "0" * 64,
    }
    job = {"id": "x", "kind": "warm", "state": "running", "repo": f"models/{LONG}", "commit": COMMIT, "error": None}
    return {
        "uptime_s": 12345.6, "draining": True, "registry_answers": False, "rss_bytes": 123_456_789,
        "models": [model | {"bytes": 987e9, "local": 876e9, "class": "pinned"}] * (MOST + 3),
        "tiers": [
            {
                "name": "l1", "path": "/mnt/nvme/" + "deep/" * 20, "state": "works", "used": 800e9, "reserved": 20e9,
                "limit": None, "min_free": 0.05, "free": 100e9, "total": 1e12, "blobs": 54321, "quarantined": 2,
                "quarantined_bytes": 5e9,
            }
        ],
        "reads": {"total": {"l1": 3e12, "memory": 1e12, "remote": 2e12}, "minute": {"l1": 0}}, "opens": shares,
        "passthrough_opens": 4321.0, "open_files": 17,
        "fills": [fill | {"bytes": 5e9, "local": 2e9, "rate": 123e6, "eta_s": 24.4}], "queued": 12,
        "in_flight": 64 << 20, "unflushed": 8 << 20,
        "sources": [
            {
                "name": "registry.models.svc.cluster.example:8470", "state": "paused", "paused_s": 4.2,
                "latency_s": 0.02, "rate": 1.2e9, "in_flight": 8, "connections": 8, "fetched": 5e12, "failures": 12,
                "failures_in_a_row": 3,
            }
        ],
        "scrubber": {
            "rate": 8e6, "paused": False, "checked_bytes": 5e9, "bad": 1,
            "tiers": {"l1": {"passes": 2, "progress": 0.45}, "l2": {"passes": 0, "progress": 0.01}},
        },
        "jobs": [job | {"seconds": 61.0, "bytes": 9e9, "bytes_done": 3e9, "path": "tokenizer.json"}],
        "oldest_request_s": 12.0,
    }  # fmt: skip


def shown(width: int, **changes: Any) -> str:
    mount = {
        "mountpoint": "/mnt/models", "alive": True, "pid": 4242, "mode": "native", "volumes": [],
        "reason": "passthrough and a keeper",
        "activity": activity(), "pool": {"used": 50e6, "limit": 128e6, "hits": {"small": 4, "chunk": 5}},
        "shadow": {
            "percent": 1.0, "compared": 999, "mismatches": 1, "mount_errors": 0, "download_errors": 2, "dropped": 3,
            "mount_seconds": {"p50": 0.001, "p99": 0.01}, "download_seconds": {"p50": 0.02, "p99": 0.2},
        },
        **changes,
    }  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(mount_view(mount, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_it_fits_and_names_are_cut_not_numbers(width: int) -> None:
    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    for number in (
        "1000/1234",
        "876.0 GB",
        "987.0 GB",
        "123.0 MB/s",
        "24 s",
        "20.0 ms",
        "1.2 GB/s",
        "8/8",
        "5.0 TB",
        "3.0 GB",
    ):
        assert number in text, number
    assert "native: passthrough and a keeper" in text
    assert "98.7%" in text
    assert "4321" in text
    assert "pinned" in text
    assert "draining" in text
    assert "paused 4 s" in text
    assert "and 3 more" in text
    assert ("COMMIT" in text) == (width == 140)
    assert "…" in text
    if width == 140:
        assert "oldest request 12.0 s" in text
        assert "98.7% of opens found here" in text
        assert "4.0 TB from here, 2.0 TB from sources" in text
        assert "not counted: 4321 files opened natively" in text
        assert "1 differ" in text


def test_a_mount_that_does_not_answer_is_shown_as_such() -> None:
    assert "it does not answer" in shown(80, activity=None)
    assert "its process is gone" in shown(80, activity=None, alive=False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.0, "42 s"), (61, "1 min 01 s"), (3700, "1 h 01 min"), (900_000, "10 days")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert time_left(seconds) == text
