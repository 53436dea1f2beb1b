"""A repository's card: the YAML at the head of its README.md, as the Hub reads it, and the tags that follow from it.

The text comes from whoever published the repository: it is bounded, aliases are refused (a few lines of them expand to
gigabytes), and what is not plain data, or not YAML at all, is no card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import yaml

MAX_CARD: Final = 64 << 10
"""Longest head of a README that is read, in bytes."""

MAX_BASES: Final = 16
MAX_NAME: Final = 200
"""Most models that one comes from, and longest name of one."""

MAX_DEPTH: Final = 16
"""Deepest nesting: a parser takes time quadratic in it."""

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LISTS: Final = {"tags": "", "language": "", "datasets": "dataset:", "base_model": "base_model:", "license": "license:"}
"""Keys of a card that give tags, and what stands before each."""


class BadCard(ValueError):
    """The head of a README is not the YAML of a card; the message says why."""


def read_card(readme: bytes) -> dict[str, Any]:
    """The card in the first ``MAX_CARD`` bytes of a README; empty where there is none, or none that can be read."""
    try:
        return parse_card(readme)
    except BadCard:
        return {}


def parse_card(readme: bytes) -> dict[str, Any]:
    """The card at the head of a README, empty where it has none. Raises BadCard."""
    lines = readme[:MAX_CARD].decode("utf-8", "replace").lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        raise BadCard(f"the metadata has no end: no line with --- in the first {MAX_CARD} bytes")
    try:
        text = "\n".join(lines[1:end])
        _check(text)
        data = yaml.load(text, _LOADER)  # noqa: S506 - plain data only, and several times faster than safe_load
        plain = json.loads(json.dumps(data, default=str, allow_nan=False))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise BadCard(str(error)) from None
    if not isinstance(plain, dict | None):
        raise BadCard("the metadata is not a mapping of names to values")
    return plain or {}


def _check(text: str) -> None:
    """Raise ValueError for aliases and deep nesting, looking no further than the first of them."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            raise ValueError(f"aliases and more than {MAX_DEPTH} levels are not taken")


def tags_of(card: Mapping[str, Any]) -> list[str]:
    """The Hub's tags for a card, each once, in order."""
    out: list[str] = []
    for key in ("library_name", "pipeline_tag"):
        if isinstance(card.get(key), str):
            out.append(card[key])
    for key, prefix in _LISTS.items():
        value = card.get(key)
        values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        out += [f"{prefix}{each}" for each in values if isinstance(each, str) and each]
    return list(dict.fromkeys(out))


def lineage(card: Mapping[str, Any]) -> dict[str, str]:
    """Where a model comes from, as its card says: ``base_model`` (commas between several), ``base_model_relation``."""
    base, relation = card.get("base_model"), card.get("base_model_relation")
    names = [base] if isinstance(base, str) else base if isinstance(base, list) else []
    bases = [name for name in names if isinstance(name, str) and 0 < len(name) <= MAX_NAME and "," not in name]
    out = {"base_model": ",".join(bases[:MAX_BASES])} if bases else {}
    if bases and isinstance(relation, str) and len(relation) <= MAX_NAME:
        out["base_model_relation"] = relation
    return out
