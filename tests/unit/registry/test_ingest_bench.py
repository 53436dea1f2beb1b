"""The ingest benchmark at a small size: it runs, every byte is new, and memory stays bounded. No word about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_half_a_gigabyte_in_bounded_memory(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.ingest", "--gb", "0.5", "--rounds", "1", "--shards", "2"]
    done = subprocess.run(
        [*command, "--directory", tmp_path, "--json", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_bytes())
    assert 0.5e9 <= result["bytes"] < 0.501e9
    assert 20e6 < result["median"]["peak_bytes"] < 200e6
    assert "median" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
