"""The measurement of the whole path, at 512 MB: right bytes, bounded memory. Its ratios are printed, never asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMORY_MAX = 300_000_000
"""RssAnon + RssShmem of the registry and of the filesystem stay below this many bytes."""


@pytest.mark.fuse
@pytest.mark.slow
def test_512_mb_are_published_and_read_within_bounded_memory(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.whole_path", "--gb", "0.512", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--directory", str(tmp_path), "--json", str(out)],
        cwd=ROOT,
        env={**os.environ, "HELIOS_LOG__FORMAT": "json"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr  # the benchmark compares the bytes read with the originals itself
    result = json.loads(out.read_text())
    assert result["bytes"] >= 512_000_000
    for daemon in ("registry", "mount"):
        assert 0 < result["median"][f"{daemon}_peak_bytes"] < MEMORY_MAX
    errors = [line for line in done.stderr.splitlines() if '"level": "error"' in line]
    assert not errors
