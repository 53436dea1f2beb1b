"""Schemas of the Prometheus operator's kinds (monitoring.coreos.com/v1), as far as the chart uses them.

Written from the operator's API reference, and compared with its own definitions as of 0.93. Fields that the chart has
no use for are left out, and unknown ones refused: the API server drops a field that is misspelt without a word, and the
scrape or the alert is then another one.
"""

from __future__ import annotations

from typing import Any, Final

import jsonschema_rs

DURATION: Final = r"^(0|((\d+)y)?((\d+)w)?((\d+)d)?((\d+)h)?((\d+)m)?((\d+)s)?((\d+)ms)?)$"
"""Prometheus' durations: numbers with units, the longest first."""
LABEL: Final = r"^[a-zA-Z_][a-zA-Z0-9_]*$"
ACTIONS: Final = ("replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep", "lowercase", "uppercase")


def _object(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Any, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


STRING: Final = {"type": "string"}
WORD: Final = {"type": "string", "minLength": 1}
TIME: Final = {"type": "string", "minLength": 1, "pattern": DURATION}
STRINGS: Final = {"type": "object", "additionalProperties": STRING}
METADATA: Final = _object(("name", "namespace"), name=WORD, namespace=WORD, labels=STRINGS, annotations=STRINGS)
SELECTOR: Final = _object(("matchLabels",), matchLabels={**STRINGS, "minProperties": 1})
RELABELING: Final = _object(
    action={"enum": list(ACTIONS)},
    regex=STRING,
    replacement=STRING,
    separator=STRING,
    sourceLabels=_list({"type": "string", "pattern": LABEL}),
    targetLabel={"type": "string", "pattern": LABEL},
)
ENDPOINT: Final = _object(
    ("port",),
    port=WORD,
    path={"type": "string", "pattern": "^/"},
    scheme={"enum": ["http", "https"]},
    interval=TIME,
    scrapeTimeout=TIME,
    honorLabels={"type": "boolean"},
    relabelings=_list(RELABELING),
    metricRelabelings=_list(RELABELING),
)
TIMES: Final = {"for": TIME, "keep_firing_for": TIME}
RULE: Final = _object(("expr", "alert"), alert=WORD, expr=WORD, labels=STRINGS, annotations=STRINGS, **TIMES)
GROUP: Final = _object(("name", "rules"), name=WORD, interval=TIME, rules=_list(RULE, 1))

SPECS: Final[dict[str, Any]] = {
    "PodMonitor": _object(
        ("selector", "podMetricsEndpoints"),
        selector=SELECTOR,
        podMetricsEndpoints=_list(ENDPOINT, 1),
        namespaceSelector=_object(("matchNames",), matchNames=_list(WORD, 1)),
    ),
    "ServiceMonitor": _object(("selector", "endpoints"), selector=SELECTOR, endpoints=_list(ENDPOINT, 1)),
    "PrometheusRule": _object(("groups",), groups=_list(GROUP, 1)),
}
"""The ``spec`` of each kind."""


def check(document: dict[str, Any]) -> None:
    """Raise ValueError for an object of these kinds that the operator would not take as it is."""
    schema = _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"enum": list(SPECS)},
        metadata=METADATA,
        spec=SPECS[document["kind"]],
    )
    jsonschema_rs.validate(schema, document)
    if document["kind"] == "PrometheusRule":
        names = [group["name"] for group in document["spec"]["groups"]]
        if len(set(names)) < len(names):  # a list with the key "name"
            raise ValueError(f"groups of the same name: {names}")
