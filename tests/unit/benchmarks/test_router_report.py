"""What the router's benchmark makes of its figures: a table, JSON and plots of all of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import router

NAMES = ("direct", "plain proxy", "router", "peer")


def row(name: str, number: int) -> dict[str, float]:
    found = {f"{what}_{n}": 10.0 * number + n for what in ("rps", "p50_ms", "p99_ms", "cpu_us") for n in (1, 32)}
    if name == "direct":
        found = {key: value for key, value in found.items() if not key.startswith("cpu")}
    else:
        found |= {"cpu_us_event": 9.0, "memory_mb": 50.0}
    if name != "plain proxy":  # which can't take these rates
        found |= {f"{q}_at_{share:g}": float(number) for q in ("p50", "p99", "p999") for share in router.SHARES}
    return found


def test_all_figures_are_in_table_json_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(router, "installed", lambda: ["peer"])
    monkeypatch.setattr(router, "version", lambda name: "1.0")
    rounds = [{name: row(name, n + number) for n, name in enumerate(NAMES)} for number in (1, 2, 3)]
    router.report(rounds, router.Scene(workers=3, trace_ratio=0.1), tmp_path / "out.json")
    said = capsys.readouterr()
    assert "p999_at_0.5" in said.out
    assert "3 workers behind each; router: spans of 0.1 of the requests" in said.out
    assert json.loads((tmp_path / "out.json").read_text())["scene"]["workers"] == 3
    assert "requests to best peer: " in said.out
    assert json.loads((tmp_path / "out.json").read_text())["median"]["table"]["router"] == row("router", 4)
    drawn = {path.name: "".join(ElementTree.parse(path).getroot().itertext()) for path in tmp_path.glob("*.svg")}
    assert sorted(drawn) == [
        "out-at-0.25.svg", "out-at-0.5.svg", "out-at-0.75.svg", "out-cpu.svg", "out-memory.svg", "out.svg",
    ]  # fmt: skip
    assert all(name in said.err for name in drawn)
    for name, text in drawn.items():
        there = {proxy for proxy in NAMES if proxy in text}
        missing = {"out-cpu.svg": {"direct"}, "out-memory.svg": {"direct"}}.get(name, set())
        assert there == set(NAMES) - missing - ({"plain proxy"} if "-at-" in name else set()), name
    assert "p999" in drawn["out-at-0.5.svg"]
    assert "32 connections" in drawn["out.svg"]
