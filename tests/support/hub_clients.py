"""The real huggingface_hub, one virtual environment for each major, run as a process against an endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("0.36.2", "1.33.0", "2.4.0")

PREAMBLE = """
import hashlib, json, os, sys, urllib.request
from pathlib import Path
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub import errors
ENDPOINT = os.environ["HF_ENDPOINT"]
MAJOR = int(__import__("huggingface_hub").__version__.split(".")[0])
api = HfApi()

def raised(call, *args, **kwargs):
    "The names of the exception's classes."
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__]
    return None

def tree(directory):
    "Path -> sha256 of the files below, through links."
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(directory).rglob("*")) if path.is_file() and ".cache" not in path.parts
    }
"""


def run_client(
    version: str,
    script: str,
    endpoint: str,
    home: Path,
    *,
    env: dict[str, str] | None = None,
    timeout_s: float = 90,
    within: Sequence[str] = (),
) -> Any:
    """Run the script, after ``PREAMBLE``, with HF_ENDPOINT and HF_HOME set; returns what it assigns to ``result``.

    ``within`` is a command that runs the command at its end.
    """
    python = ROOT / ".venvs" / f"hub-{version}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"huggingface_hub {version} is not there: run scripts/hub_venvs.py")
    code = f"{PREAMBLE}\n{textwrap.dedent(script)}\nprint('RESULT ' + json.dumps(result))"
    done = subprocess.run(
        [*within, str(python), "-c", code],
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **(env or {}),
        },
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"huggingface_hub {version}:\n{done.stdout}\n{done.stderr}"
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT "))
