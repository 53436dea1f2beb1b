"""Cases of huggingface_hub run in the environments of its versions: one process for all the cases of a version."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_clients import ROOT

HERE = Path(__file__).parent


@cache
def cases(module: str, version: str) -> list[str]:
    """Names of a version's cases in a module, which only the clients' environments import."""
    tree, major = ast.parse((HERE / module).read_text()), int(version.partition(".")[0])
    marked = [
        node.name.replace("_", " ")
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(getattr(d, "id", "") == "case" for d in node.decorator_list)
        and all(major in majors for majors in map(_majors, node.decorator_list) if majors is not None)
    ]
    assert len(marked) == len(set(marked))
    return marked


def _majors(decorator: ast.expr) -> list[int] | None:
    """Those that ``@majors(...)`` names; None for another decorator."""
    if not isinstance(decorator, ast.Call) or getattr(decorator.func, "id", "") != "majors":
        return None
    return [ast.literal_eval(argument) for argument in decorator.args]


def run_cases(
    version: str, module: str, context: Mapping[str, Any], home: Path, env: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """Run a module's cases; returns what went wrong with each, None where nothing did."""
    python = ROOT / ".venvs" / f"hub-{version}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"huggingface_hub {version} is not there: run scripts/hub_venvs.py")
    home.mkdir(parents=True)
    (home / "context.json").write_text(json.dumps(dict(context)))
    done = subprocess.run(
        [str(python), str(HERE / "hub_driver.py"), str(HERE / module), str(home / "context.json")],
        env={
            **os.environ,
            "PYTHONPATH": "",
            "HF_ENDPOINT": context["endpoint"],
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_COLOR": "1",
            **(env or {}),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert done.returncode == 0, f"huggingface_hub {version}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert lines, f"huggingface_hub {version}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    report: dict[str, str | None] = json.loads(lines[-1].removeprefix("REPORT "))
    return report
