"""Who manages which fields: sets of paths, their form on the wire, and what server-side apply does with them.

Source: kubernetes.io/docs/reference/using-api/server-side-apply and sigs.k8s.io/structured-merge-diff (FieldsV1). A
path is a tuple of steps: ``f:name`` a field, ``k:{…}`` an element of a map list, ``v:…`` an element of a set; the path
of an element itself is in the set, too, as ``.``. What is atomic is one path, whatever is in it.

Simplified: an apply is merged with the object's fields as they are stored, versions of a kind are not converted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tests.fakes.kubernetes.schema import MAP, SET, Schema
from tests.fakes.kubernetes.store import copied

Path = tuple[str, ...]
UNMANAGED = {("f:apiVersion",), ("f:kind",)} | {
    ("f:metadata", f"f:{name}")
    for name in (
        "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "selfLink",
        "deletionTimestamp", "deletionGracePeriodSeconds",
    )
}  # fmt: skip


UNKNOWN = Schema({})


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def key_step(schema: Schema, element: Any) -> str:
    return f"k:{_compact(dict(schema.key(element)))}"


def leaves(value: Any, schema: Schema, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The paths that a configuration owns, with their values; of an element itself the value is None."""
    if path in UNMANAGED:
        return
    if isinstance(value, dict) and value and not schema.atomic_map:
        for name, one in value.items():
            yield from leaves(one, schema.field(name) or UNKNOWN, (*path, f"f:{name}"))
    elif isinstance(value, list) and schema.list_type == MAP:
        for one in value:
            here = (*path, key_step(schema, one))
            yield here, None
            yield from leaves(one, schema.element, here)
    elif isinstance(value, list) and schema.list_type == SET:
        for one in value:
            yield (*path, f"v:{_compact(one)}"), one
    else:
        yield path, value


def changed(before: Any, after: Any, schema: Schema) -> tuple[set[Path], set[Path]]:
    """Paths that are other ones or new in ``after``, and those that are gone."""
    old, new = dict(leaves(before, schema)), dict(leaves(after, schema))
    return {path for path, value in new.items() if path not in old or old[path] != value}, set(old) - set(new)


def merge(live: Any, wanted: Any, schema: Schema) -> Any:
    """``live`` with what is ``wanted`` laid over it."""
    if isinstance(live, dict) and isinstance(wanted, dict) and not schema.atomic_map:
        found = dict(live)
        for name, one in wanted.items():
            found[name] = merge(live.get(name), one, schema.field(name) or UNKNOWN)
        return found
    if isinstance(live, list) and isinstance(wanted, list) and schema.list_type == SET:
        return live + [one for one in wanted if one not in live]
    if isinstance(live, list) and isinstance(wanted, list) and schema.list_type == MAP:
        there = {schema.key(one): one for one in live}
        ours = [(schema.key(one), one) for one in wanted]
        known = {key for key, _ in ours}
        turns = iter([*ours])
        found = []
        for key, one in there.items():  # each of ours takes a place of ours, in the order that was asked for
            taken = next(turns) if key in known else None
            found.append(one if taken is None else merge(there.get(taken[0]), taken[1], schema.element))
        return found + [merge(there.get(key), one, schema.element) for key, one in turns]
    return copied(wanted)


def remove(value: Any, gone: set[Path], schema: Schema, path: Path = ()) -> Any:
    """``value`` without these paths, and without the maps and lists that are empty because of that."""
    if isinstance(value, dict) and not schema.atomic_map:
        found = {}
        for name, one in value.items():
            here, inner = (*path, f"f:{name}"), schema.field(name) or UNKNOWN
            if here in gone:
                continue
            rest = remove(one, gone, inner, here)
            if rest not in ({}, []) or one in ({}, []):
                found[name] = rest
        return found
    if isinstance(value, list) and schema.list_type == MAP:
        steps = [(one, (*path, key_step(schema, one))) for one in value]
        return [remove(one, gone, schema.element, here) for one, here in steps if here not in gone]
    if isinstance(value, list) and schema.list_type == SET:
        return [one for one in value if (*path, f"v:{_compact(one)}") not in gone]
    return value


def encoded(paths: Iterable[Path]) -> dict[str, Any]:
    """FieldsV1."""
    whole: dict[str, Any] = {}
    for path in sorted(paths):
        at = whole
        for step in path:
            at = at.setdefault(step, {})
        if path[-1].startswith("k:"):
            at["."] = {}
    return whole


def decoded(fields: dict[str, Any], path: Path = ()) -> set[Path]:
    """The paths of FieldsV1."""
    found: set[Path] = set()
    for step, inner in fields.items():
        if step == ".":
            found.add(path)
        elif not inner:
            found.add((*path, step))
        else:
            found |= decoded(inner, (*path, step))
    return found


class Managers:
    """``metadata.managedFields`` of one object as sets: who, how, of which subresource -> paths."""

    def __init__(self, entries: Iterable[dict[str, Any]]) -> None:
        self._of: dict[tuple[str, str, str], set[Path]] = {}
        self._rest: dict[tuple[str, str, str], dict[str, Any]] = {}
        for one in entries:
            who = one["manager"], one["operation"], one.get("subresource", "")
            self._of[who], self._rest[who] = decoded(one["fieldsV1"]), one

    def entries(self, api_version: str, now: str, before: Managers) -> list[dict[str, Any]]:
        """On the wire; the time of an entry is when it changed."""
        found = []
        for who, paths in sorted(self._of.items()):
            if not paths:
                continue
            same = before._of.get(who) == paths
            found.append({
                "manager": who[0], "operation": who[1], "apiVersion": api_version, "fieldsType": "FieldsV1",
                "time": before._rest[who]["time"] if same else now, "fieldsV1": encoded(paths),
                **({"subresource": who[2]} if who[2] else {}),
            })  # fmt: skip
        return found

    def updated(self, manager: str, subresource: str, set_: set[Path], gone: set[Path]) -> None:
        """An update: what it has changed is its own now, and of nobody else."""
        who = manager, "Update", subresource
        for other, paths in self._of.items():
            self._of[other] = {path for path in paths if path not in gone and (other == who or path not in set_)}
        self._of[who] = self._of.get(who, set()) | set_

    def conflicts(self, who: tuple[str, str, str], paths: set[Path]) -> dict[str, list[Path]]:
        """Which of these others have: by manager."""
        found: dict[str, list[Path]] = {}
        for other, theirs in self._of.items():
            if other != who and (both := sorted(paths & theirs)):
                found.setdefault(other[0], []).extend(both)
        return found

    def applied(
        self, who: tuple[str, str, str], wanted: set[Path], set_: set[Path], exists: Callable[[Path], bool]
    ) -> set[Path]:
        """An apply: ``wanted`` is all that ``who`` has now, ``set_`` what it took from others. The paths that nobody
        has any more, of those that were its own."""
        before = self._of.get(who, set())
        for other in self._of:
            if other != who:
                self._of[other] -= set_
        self._of[who] = wanted
        others = set().union(*(paths for other, paths in self._of.items() if other != who)) | wanted
        inside = {path[:length] for path in others for length in range(1, len(path) + 1)}
        return {path for path in before - wanted if path not in inside and exists(path)}
