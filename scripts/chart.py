#!/usr/bin/env python3
"""What is generated of node-daemonset/: for .venv/bin/python, after a change of chart, settings or dashboard.

    python scripts/chart.py                  # write it
    python scripts/chart.py --check          # say what is out of date, and exit with 1
    python scripts/chart.py --render < in    # one JSON list of values a line -> a line {"files"} or {"error"} for each

- In values.schema.json the settings of helios/config.py, so that `helm install` refuses one that the program would.
- chart/dashboards/helios.json (scripts/dashboard.py).
- chart/crds/: the CustomResourceDefinitions of orchestrator/api/, and their reference in docs/operator-resources.md.
- manifests/: the chart rendered with manifests/values.yaml, for those who have no Helm.

Rendering is Helm's own engine, from the package helm-python-sdk. It is a Go library that takes over a process' signals,
so tests call this script for it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHART = ROOT / "node-daemonset" / "chart"
MANIFESTS = ROOT / "node-daemonset" / "manifests"
SCHEMA = CHART / "values.schema.json"
NAME = NAMESPACE = "helios"
BASE = ("namespace.yaml", "priority.yaml", "keeper.yaml", "worker.yaml", "csi-driver.yaml", "csi-node.yaml",
        "csi-controller.yaml", "network.yaml")  # fmt: skip
"""What `kubectl apply -k` brings; the other files are for those who name them."""
HEAD = "# Made by scripts/chart.py from node-daemonset/chart and manifests/values.yaml; changes here are lost.\n"


def rendered(values: dict[str, Any]) -> dict[str, str]:
    """The chart's templates by file name, without those that are empty. Raises helm_python.HelmError."""
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=NAME, namespace=NAMESPACE, is_install=True)
    texts = {path.rsplit("/", 1)[-1]: text for path, text in files.items()}
    return {name: text for name, text in texts.items() if text.strip() and not name.startswith("_")}


def schema() -> str:
    """values.schema.json with the settings as they are now: those whose names begin with a capital."""
    import msgspec

    from helios.config import Config

    current = json.loads(SCHEMA.read_text())
    ours = {name: each for name, each in current["$defs"].items() if name[0].islower()}
    settings = msgspec.json.schema(Config)["$defs"]
    settings = {name: _described(each) for name, each in sorted(settings.items())}
    reached, waiting = {}, re.findall(r"#/\$defs/([A-Z]\w*)", json.dumps({**current, "$defs": ours}))
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached[name] = settings[name]
            waiting += re.findall(r"#/\$defs/([A-Z]\w*)", json.dumps(settings[name]))
    current["$defs"] = {**ours, **dict(sorted(reached.items()))}
    return json.dumps(current, indent=1, ensure_ascii=False) + "\n"


def _described(part: Any) -> Any:
    """Without titles and defaults: these are the program's business, and would be a second place that says them."""
    if isinstance(part, dict):
        kept = {key: value for key, value in part.items() if key not in ("title", "default", "description")}
        if isinstance(part.get("properties"), dict):  # names of settings, of which one may be called "default"
            kept["properties"] = {key: _described(value) for key, value in part["properties"].items()}
        return {key: value if key == "properties" else _described(value) for key, value in kept.items()}
    return [_described(each) for each in part] if isinstance(part, list) else part


def manifests() -> dict[str, str]:
    """The plain manifests by file name."""
    import yaml

    files = {
        name: HEAD + "".join(line + "\n" for line in text.splitlines() if line.strip())
        for name, text in rendered(yaml.safe_load((MANIFESTS / "values.yaml").read_text())).items()
        if name != "NOTES.txt"
    }
    files["namespace.yaml"] = HEAD + yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
        }
    )
    images = [
        {"name": f"registry.example/helios/{part}"}
        for part in ("keeper", "worker", "csi", "registry", "router", "operator")
    ]
    images = [{**each, "newName": each["name"], "newTag": "0.1.0"} for each in images]
    files["kustomization.yaml"] = (
        HEAD
        + "# A kustomization of your own that has this one as its base says where the images are.\n"
        + yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": list(BASE),
                "images": [each for each in images if each["name"].rsplit("/", 1)[-1] in ("keeper", "worker", "csi")],
            },
            sort_keys=False,
        )
    )
    return files


def parts_of_chart() -> dict[Path, str]:
    """What is generated of the chart itself, by its path; rendering reads it."""
    import dashboard
    import resources

    files = {CHART / "crds" / name: text for name, text in crds().items()}
    files[resources.PAGE] = resources.page()
    return {**files, SCHEMA: schema(), CHART / "dashboards" / "helios.json": dashboard.text()}


def crds() -> dict[str, str]:
    """The CustomResourceDefinitions by file name."""
    import yaml

    from orchestrator.api.crds import definitions

    head = "# Made by scripts/chart.py from orchestrator/api; changes here are lost.\n"
    # width: a description is one line, so that a change of a word changes one line
    return {
        name: head + yaml.dump(each, Dumper=_plain_dumper(), sort_keys=False, width=1 << 16)
        for name, each in definitions().items()
    }


def _plain_dumper() -> Any:
    import yaml

    class Plain(yaml.SafeDumper):
        """Without anchors, which not everybody reads."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Plain


def serve() -> int:
    """Render what is asked for on standard input."""
    import helm_python

    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"files": rendered(json.loads(line))}
        except helm_python.HelmError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    return 0


def main() -> int:
    if "--render" in sys.argv:
        return serve()
    check = "--check" in sys.argv
    stale = []
    for make in (parts_of_chart, lambda: {MANIFESTS / name: text for name, text in manifests().items()}):
        for path, text in make().items():
            if not path.exists() or path.read_text() != text:
                stale.append(path.relative_to(ROOT))
                if not check:
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(text)
    for path in stale:
        print(f"{path} {'is out of date: run python scripts/chart.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
