"""The chart, rendered by Helm's own engine in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DAEMONSET = ROOT / "node-daemonset"


class Refused(Exception):
    """Why Helm does not render it."""


class Chart:
    """Renders the chart, as often as one likes."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "scripts" / "chart.py"), "--render"]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)

    def files(self, values: dict[str, Any]) -> dict[str, str]:
        """The files by name. Raises Refused."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["files"]

    def objects(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        files = self.files(values)
        files.pop("NOTES.txt", None)
        return [each for text in files.values() for each in yaml.safe_load_all(text) if each]

    def close(self) -> None:
        self._process.communicate(timeout=20)
