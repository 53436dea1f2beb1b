"""What an API server does with objects, without HTTP: admission, versions, generations, managers, deletion, collection.

Sources: kubernetes.io/docs/reference/using-api/api-concepts and /server-side-apply, the API conventions
(sig-architecture/api-conventions.md: generation, status), kubernetes.io/docs/concepts/overview/working-with-objects/
finalizers and /concepts/architecture/garbage-collection. Simplified: no versions are converted, deletion in the
foreground is deletion in the background, quotas count objects of a kind in a namespace.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from helios.kube import kinds
from helios.kube.kinds import Kind
from tests.fakes.kubernetes import cel, patches
from tests.fakes.kubernetes.custom import Served, defaulted, served_by
from tests.fakes.kubernetes.defaults import DEFAULTS
from tests.fakes.kubernetes.errors import Refusal, conflict, invalid, not_found
from tests.fakes.kubernetes.fields import Managers, changed, leaves, merge, remove
from tests.fakes.kubernetes.schema import builtin, drop_nulls, prune
from tests.fakes.kubernetes.store import Manifest, Place, Store, copied

NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
KEPT = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation")
BUILT_IN = [one for one in vars(kinds).values() if isinstance(one, Kind)]
IMMUTABLE = {"Deployment": ("selector",), "Service": ("clusterIP",)}


class Cluster:
    """``store`` has the objects; who reads them there must not change them."""

    def __init__(self) -> None:
        self.store = Store()
        self.kinds: dict[tuple[str, str, str], Served] = {}
        self.quotas: dict[tuple[str, str], int] = {}
        """Namespace and resource -> most objects of it."""
        self.made: Counter[tuple[str, str]] = Counter()
        """Kind and verb -> writes that changed something."""
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        for kind in BUILT_IN:
            self.serve(Served(kind, builtin(kind.group, kind.version, kind.kind), scale=_scale_of(kind)))
        for name in ("default", "kube-system", "ns"):
            self.store.put("namespaces", self._new(kinds.NAMESPACE, {"metadata": {"name": name}}))

    def serve(self, served: Served) -> None:
        """Know a kind."""
        kind = served.kind
        self.kinds[kind.group, kind.version, kind.plural] = served

    def now(self) -> str:
        return self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")

    # --- reading ---

    def get(self, kind: Kind, namespace: str, name: str) -> Manifest:
        found = self.store.objects.get((kind.resource, namespace, name))
        if found is None:
            raise not_found(kind.resource, name)
        return found

    # --- writing ---

    def create(self, served: Served, namespace: str, body: Manifest, *, manager: str, strict: bool) -> Manifest:
        kind = served.kind
        metadata = body.setdefault("metadata", {})
        if kind.namespaced and metadata.setdefault("namespace", namespace) != namespace:
            raise Refusal(400, "BadRequest", "the namespace of the object does not match the namespace of the request")
        if "generateName" in metadata and not metadata.get("name"):
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        self._checked_name(served, metadata)
        place = kind.resource, namespace if kind.namespaced else "", metadata["name"]
        if place in self.store.objects:
            raise Refusal(409, "AlreadyExists", f'{kind.resource} "{metadata["name"]}" already exists')
        if metadata.get("resourceVersion"):
            raise Refusal(400, "BadRequest", "resourceVersion should not be set on objects to be created")
        one = self._admitted(served, body, None, strict=strict)
        if served.status:
            one.pop("status", None)
        managers = Managers([])
        managers.updated(manager, "", {path for path, _ in leaves(one, served.schema)}, set())
        return self._stored(served, self._new(kind, one), managers, Managers([]), "create")

    def replace(
        self, served: Served, namespace: str, name: str, body: Manifest, *, manager: str, strict: bool,
        subresource: str = "", verb: str = "update",
    ) -> Manifest:  # fmt: skip
        """An update, of whichever kind: the whole object as it is to be."""
        kind = served.kind
        live = self.get(kind, namespace, name)
        metadata = body.get("metadata") or {}
        self._precondition(served, live, metadata.get("uid"), metadata.get("resourceVersion"))
        one = self._part(served, live, body, subresource)
        one = self._admitted(served, one, live, strict=strict)
        managers = Managers(live["metadata"].get("managedFields", ()))
        before = Managers(live["metadata"].get("managedFields", ()))
        managers.updated(manager, subresource, *changed(_plain(live), _plain(one), served.schema))
        return self._stored(served, one, managers, before, verb, live)

    def patch(
        self, served: Served, namespace: str, name: str, patch: Any, how: str, *, manager: str, strict: bool,
        subresource: str = "",
    ) -> Manifest:  # fmt: skip
        """A JSON patch (a list) or a merge patch."""
        live = self.get(served.kind, namespace, name)
        version, live = live["metadata"]["resourceVersion"], _plain(live)
        live["metadata"]["resourceVersion"] = version
        if isinstance(patch, list) != (how == "json"):
            raise Refusal(400, "BadRequest", "the patch does not fit its content type")
        body = patches.json_patch(live, patch) if how == "json" else patches.merge_patch(live, patch)
        return self.replace(
            served, namespace, name, body, manager=manager, strict=strict, subresource=subresource, verb="patch"
        )

    def apply(
        self, served: Served, namespace: str, name: str, body: Manifest, *, manager: str, force: bool, strict: bool,
        subresource: str = "",
    ) -> Manifest:  # fmt: skip
        """Server-side apply."""
        kind, schema = served.kind, served.schema
        metadata = body.setdefault("metadata", {})
        if (body.get("apiVersion"), body.get("kind")) != (kind.api_version, kind.kind) or metadata.get("name") != name:
            raise Refusal(400, "BadRequest", "apiVersion, kind and metadata.name must be those of the request")
        if metadata.get("managedFields"):
            raise Refusal(400, "BadRequest", "metadata.managedFields must be nil")
        body = self._pruned(served, body, strict=strict)
        live = self.store.objects.get((kind.resource, namespace if kind.namespaced else "", name))
        if live is None and subresource:
            raise not_found(kind.resource, name)
        if live is None and metadata.get("uid"):
            raise conflict(
                kind.resource, name, f"uid mismatch: the object specified uid {metadata['uid']}, none exists"
            )
        if live is not None:
            uid = metadata.get("uid", live["metadata"]["uid"])
            if uid != live["metadata"]["uid"]:  # as 1.36 has it, with force or without
                why = f'Invalid value: "{uid}": field is immutable'
                raise invalid(kind.kind, name, [("metadata.uid", why)])
            self._precondition(served, live, uid, metadata.get("resourceVersion"))
        plain = {"metadata": {}} if live is None else _plain(live)
        part = {key: body[key] for key in body if key in ("metadata", "status")} if subresource else body
        if not subresource and served.status:
            part = {key: value for key, value in body.items() if key != "status"}
        who, wanted = (manager, "Apply", subresource), dict(leaves(part, schema))
        if subresource:
            wanted = {path: value for path, value in wanted.items() if path[0] == "f:status"}
        merged = merge(plain, part, schema)
        entries = [] if live is None else live["metadata"].get("managedFields", ())
        managers, before = Managers(entries), Managers(entries)
        there = dict(leaves(plain, schema))
        differ = {path for path, value in wanted.items() if path not in there or there[path] != value}
        if (found := managers.conflicts(who, differ)) and not force:
            raise _apply_conflict(found)
        gone = managers.applied(who, set(wanted), differ, lambda path: path in there)
        one = remove(merged, gone, schema)
        if live is None:
            one = _strip(one, kind, namespace)
            self._checked_name(served, one["metadata"])
            one = self._new(kind, self._admitted(served, one, None, strict=False))
            return self._stored(served, one, managers, before, "apply")
        one = self._part(served, live, one, subresource)
        return self._stored(served, self._admitted(served, one, live, strict=False), managers, before, "apply", live)

    def delete(self, served: Served, namespace: str, name: str, options: Manifest) -> Manifest:
        """The object, if it waits for finalizers, or a Status."""
        kind, live = served.kind, self.get(served.kind, namespace, name)
        wanted = options.get("preconditions") or {}
        for field, found in (
            ("uid", live["metadata"]["uid"]),
            ("resourceVersion", live["metadata"]["resourceVersion"]),
        ):
            if wanted.get(field) not in (None, found):
                raise Refusal(
                    409, "Conflict", f'Operation cannot be fulfilled on {kind.resource} "{name}": the {field} in the '
                    f"precondition ({wanted[field]}) does not match the {field} in record ({found})",
                )  # fmt: skip
        waits = bool(live["metadata"].get("finalizers")) or (kind == kinds.POD and live["spec"].get("nodeName"))
        if waits and options.get("gracePeriodSeconds") != 0:
            if live["metadata"].get("deletionTimestamp"):
                return live
            one = copied(live)
            one["metadata"] |= {"deletionTimestamp": self.now(), "deletionGracePeriodSeconds": 0}
            if "generation" in one["metadata"]:
                one["metadata"]["generation"] += 1
            self.made[kind.kind, "delete"] += 1
            return self.store.put(kind.resource, one)
        self.made[kind.kind, "delete"] += 1
        self._removed(kind, live)
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                "details": {"name": name, "kind": kind.plural, "uid": live["metadata"]["uid"]}}  # fmt: skip

    def collect(self) -> bool:
        """Delete what has owners of which none is there any more, as the garbage collector does; whether there was."""
        there = {one["metadata"].get("uid") for one in self.store.objects.values()}
        found = False
        for (resource, namespace, name), one in list(self.store.objects.items()):
            references = one["metadata"].get("ownerReferences") or ()
            if not references or any(each["uid"] in there for each in references):
                continue
            if not one["metadata"].get("deletionTimestamp"):
                served = next(each for each in self.kinds.values() if each.kind.resource == resource)
                self.delete(served, namespace, name, {})
                self.made[served.kind.kind, "delete"] -= 1  # nobody asked for it
                found = True
        return found

    # --- how ---

    def _removed(self, kind: Kind, one: Manifest) -> None:
        place: Place = kind.resource, one["metadata"].get("namespace", ""), one["metadata"]["name"]
        self.store.remove(place)
        if kind == kinds.CUSTOM_RESOURCE:
            for served in served_by(one):
                self.kinds.pop((served.kind.group, served.kind.version, served.kind.plural), None)
                for where in [where for where in self.store.objects if where[0] == served.kind.resource]:
                    self.store.remove(where)

    def _checked_name(self, served: Served, metadata: Manifest) -> None:
        name = metadata.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise invalid(served.full_name, str(name), [("metadata.name", f"Invalid value: {name!r}: RFC 1123")])
        namespace = metadata.get("namespace", "")
        if served.kind.namespaced and ("namespaces", "", namespace) not in self.store.objects:
            raise not_found("namespaces", namespace)

    def _pruned(self, served: Served, body: Manifest, *, strict: bool) -> Manifest:
        one = copied(body)
        if not served.custom:
            drop_nulls(one)
        unknown = prune(one, served.schema)
        if unknown and strict:
            listed = ", ".join(f'unknown field "{path}"' for path in unknown)
            raise Refusal(400, "BadRequest", f"strict decoding error: {listed}")
        return one

    def _admitted(self, served: Served, body: Manifest, live: Manifest | None, *, strict: bool) -> Manifest:
        """Pruned, with defaults, and checked against schema, rules, what may not change, and quotas."""
        kind = served.kind
        one = self._pruned(served, body, strict=strict)
        one["apiVersion"], one["kind"] = kind.api_version, kind.kind
        name, namespace = one["metadata"]["name"], one["metadata"].get("namespace", "")
        if served.custom:
            defaulted(one, served.schema)
        served.checked(one)
        if served.custom:
            old = cel.MISSING if live is None else live
            if causes := list(cel.wrong(one, old, served.schema)):
                raise invalid(served.full_name, name, causes)
        elif kind.kind in DEFAULTS:
            DEFAULTS[kind.kind](one)
        for field in IMMUTABLE.get(kind.kind, ()) if live is not None else ():
            if live["spec"].get(field) != one["spec"].get(field):
                raise invalid(served.full_name, name, [(f"spec.{field}", "Invalid value: field is immutable")])
        if kind == kinds.CUSTOM_RESOURCE:
            for each in served_by(one):
                self.serve(each)
            one["status"] = {
                "conditions": [{"type": "Established", "status": "True", "reason": "InitialNamesAccepted"}]
            }
        most = self.quotas.get((namespace, kind.resource))
        if live is None and most is not None:
            used = sum(place[:2] == (kind.resource, namespace) for place in self.store.objects)
            if used >= most:
                count = f"count/{kind.resource}"
                raise Refusal(
                    403, "Forbidden", f'{kind.resource} "{name}" is forbidden: exceeded quota: objects, requested: '
                    f"{count}=1, used: {count}={used}, limited: {count}={most}",
                )  # fmt: skip
        return one

    def _part(self, served: Served, live: Manifest, body: Manifest, subresource: str) -> Manifest:
        """What of ``body`` counts: the status alone, or everything but it; what the server owns stays."""
        one = _plain(live)
        if subresource == "status":
            one.pop("status", None)
            if body.get("status") is not None:
                one["status"] = body["status"]
            return one
        status = one.get("status")
        one = {**body, "metadata": dict(body.get("metadata") or {})}
        if served.status:
            one.pop("status", None)
            if status is not None:
                one["status"] = status
        for name in (*KEPT, "name", "namespace"):
            one["metadata"].pop(name, None)
            if name in live["metadata"]:
                one["metadata"][name] = live["metadata"][name]
        one["metadata"].pop("managedFields", None)
        deleting = live["metadata"].get("deletionTimestamp")
        if deleting and set(one["metadata"].get("finalizers") or ()) - set(live["metadata"].get("finalizers") or ()):
            raise invalid(
                served.full_name, live["metadata"]["name"],
                [("metadata.finalizers", "Forbidden: no new finalizers can be added if the object is being deleted")],
            )  # fmt: skip
        return one

    def _precondition(self, served: Served, live: Manifest, uid: Any, version: Any) -> None:
        resource, name = served.kind.resource, live["metadata"]["name"]
        if uid not in (None, live["metadata"]["uid"]):
            why = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {live['metadata']['uid']}"
            raise conflict(resource, name, why)
        if version not in (None, "", live["metadata"]["resourceVersion"]):
            why = "the object has been modified; please apply your changes to the latest version and try again"
            raise conflict(resource, name, why)

    def _new(self, kind: Kind, one: Manifest) -> Manifest:
        metadata = {**one["metadata"], "uid": str(uuid.uuid4()), "creationTimestamp": self.now()}
        if ("spec" in one or kind.group) and kind.group not in ("coordination.k8s.io", "events.k8s.io"):
            metadata["generation"] = 1
        return {**one, "apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata}

    def _stored(
        self, served: Served, one: Manifest, managers: Managers, before: Managers, verb: str,
        live: Manifest | None = None,
    ) -> Manifest:  # fmt: skip
        kind = served.kind
        metadata = one["metadata"] = {key: value for key, value in one["metadata"].items() if key != "resourceVersion"}
        if metadata.get("finalizers") == []:
            del metadata["finalizers"]
        entries = managers.entries(kind.api_version, self.now(), before)
        if live is not None:
            if _plain(live) == one and entries == live["metadata"].get("managedFields", []):
                return live  # nothing changes, and so does the version not
            if "generation" in metadata and _meant(live, served) != _meant(one, served):
                metadata["generation"] = live["metadata"]["generation"] + 1
        self.made[kind.kind, verb] += 1
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers") and live is not None:
            self._removed(kind, live)
            return one | {"metadata": metadata | {"resourceVersion": str(self.store.version)}}
        if entries:
            metadata["managedFields"] = entries
        return self.store.put(kind.resource, one)


def _plain(one: Manifest) -> Manifest:
    """Without what is the server's own business."""
    hidden = ("managedFields", "resourceVersion")
    return {**one, "metadata": {key: value for key, value in one["metadata"].items() if key not in hidden}}


def _meant(one: Manifest, served: Served) -> Manifest:
    """What the generation counts the changes of: all but metadata and, where it is a subresource, status."""
    hidden = ("metadata", "status") if served.status else ("metadata",)
    return {key: value for key, value in one.items() if key not in hidden}


def _strip(one: Manifest, kind: Kind, namespace: str) -> Manifest:
    metadata = {key: value for key, value in one["metadata"].items() if key not in ("uid", "resourceVersion")}
    return {**one, "metadata": metadata | ({"namespace": namespace} if kind.namespaced else {})}


def _scale_of(kind: Kind) -> dict[str, str] | None:
    if kind.kind not in ("Deployment", "ReplicaSet"):
        return None
    return {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"}


def _apply_conflict(found: dict[str, list[tuple[str, ...]]]) -> Refusal:
    """409, with the words of apimachinery's NewApplyConflict."""
    causes, listed = [], list(_conflicts(found))
    for manager, path in listed:
        causes.append((path, f'conflict with "{manager}"'))
    count = f"{len(listed)} conflict{'s' if len(listed) > 1 else ''}"
    text = ", ".join(f'conflict with "{manager}": {path}' for manager, path in listed)
    return Refusal(409, "Conflict", f"Apply failed with {count}: {text}", causes=causes)


def _conflicts(found: dict[str, list[tuple[str, ...]]]) -> Iterator[tuple[str, str]]:
    for manager, paths in sorted(found.items()):
        for path in paths:
            steps = (f".{one[2:]}" if one.startswith("f:") else f"[{one[2:]}]" for one in path)
            yield manager, "".join(steps)
