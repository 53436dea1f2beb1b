"""Arbitrary valid resources, from their types: what a field may hold follows from what msgspec is told of it.

``OURS`` is for fields whose type says less than Kubernetes wants of them.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from msgspec import inspect

from orchestrator.api.parse import service_spec
from orchestrator.api.service import ServiceSpec

COMMITS = ["a" * 40, "b" * 40, "c" * 40]
KEYS = st.sampled_from(["pool", "topology.kubernetes.io/zone", "example.com/x"])
VALUES = st.sampled_from(["", "gpu", "eu-1a", "A_b.c-9"])
TOLERATIONS = st.sampled_from(
    [{"operator": "Exists"}, {"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute"}]
)
VARIABLES = st.sampled_from([
    {"name": "A", "value": "$(B)"}, {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
    {"name": "HOME", "value": "/"},
])  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30)
BYTES = st.sampled_from(["1.5Gi", "64Gi", "500M", "17179869184"])
OURS: dict[str, st.SearchStrategy[Any]] = {
    "nodeSelector": st.dictionaries(KEYS, VALUES, max_size=2),
    "selector": st.dictionaries(KEYS, VALUES, max_size=2),
    "tolerations": st.lists(TOLERATIONS, max_size=2),
    "env": st.lists(VARIABLES, max_size=2, unique_by=lambda one: one["name"]),
    "args": st.lists(TEXT, max_size=3),
    "resource": st.sampled_from(["nvidia.com/gpu", "amd.com/gpu", "nvidia.com/mig-1g.5gb"]),
    "label": st.sampled_from(["nvidia.com/gpu.product", "gpu"]),
    "type": st.none() | st.sampled_from(["NVIDIA-H100-80GB-HBM3", "a"]),
    "priorityClassName": st.none() | st.just("high"),
    "runtimeClassName": st.none() | st.just("nvidia"),
    "startTimeoutSeconds": st.integers(10, 3600),
    "image": st.just("registry.example/mine:1"),
    "commit": st.sampled_from(COMMITS),
    "servedName": st.none() | TEXT.filter(lambda name: "@" not in name and name[0] != "-") | st.just("$(HOME)"),
    "memory": BYTES,
    "cache": BYTES,
    "sharedMemory": BYTES,
    "steps": st.sets(st.integers(1, 99), max_size=4).map(lambda found: [*sorted(found), 100]),
}


def values(info: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type, as JSON has them."""
    match info:
        case inspect.Metadata(type=inner):
            return values(inner)
        case inspect.StructType():
            return struct(info)
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType(ge=low, le=high):
            least = low or 0
            return st.integers(least, min(high if high is not None else 1000, least + 1000))
        case inspect.StrType(pattern=str() as pattern, max_length=longest):
            return st.from_regex(pattern, alphabet=st.characters(max_codepoint=127)).filter(
                lambda text: len(text) <= (longest or 200)
            )
        case inspect.StrType(max_length=longest, min_length=shortest):
            return st.text("abc-XY.9/", min_size=shortest or 0, max_size=min(longest or 20, 40))
        case inspect.LiteralType(values=known):
            return st.sampled_from(known)
        case inspect.NoneType():
            return st.none()
        case inspect.UnionType(types=types):
            return st.one_of(*map(values, types))
        case inspect.ListType(item_type=item):
            return st.lists(values(item), max_size=3)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=2)
    raise TypeError(f"no values of {info}")


def struct(info: inspect.StructType) -> st.SearchStrategy[dict[str, Any]]:
    fields = {
        one.encode_name: OURS[one.encode_name] if one.encode_name in OURS else values(one.type) for one in info.fields
    }
    required = {one.encode_name: fields[one.encode_name] for one in info.fields if one.required}
    optional = {name: one for name, one in fields.items() if name not in required}
    return st.fixed_dictionaries(required, optional=optional)


def _coherent(spec: dict[str, Any]) -> dict[str, Any]:
    """With what the schema's rules want of several fields together."""
    if spec.pop("apart"):
        spec.pop("aggregated", None)
        spec["prefill"], spec["decode"] = spec.get("prefill") or {}, spec.get("decode") or {}
        engine = spec.setdefault("engine", {})
        if engine.get("connector") == "none":
            engine["connector"] = "nixl"
        if engine.get("connector") == "shared-storage":
            engine["kvStorage"] = {"claimName": "kv"}
        else:
            engine.pop("kvStorage", None)
    else:
        spec["aggregated"] = spec.get("aggregated") or {}
        spec.get("engine", {}).pop("kvStorage", None)
        spec.pop("prefill", None)
        spec.pop("decode", None)
    roles = [spec[name] for name in ("aggregated", "prefill", "decode") if spec.get(name)]
    for scaling in [spec.get("scaling"), *(role.get("scaling") for role in roles)]:
        if scaling:
            low, high = scaling.get("minReplicas", 1), scaling.get("maxReplicas", 4)
            scaling["minReplicas"], scaling["maxReplicas"] = min(low, 6), max(min(high, 6), min(low, 6), 1)
            for other in ("overprovision", "forecast", "maxCost"):
                scaling.pop(other, None)
            if "targets" in scaling and not any(scaling["targets"].values()):
                del scaling["targets"]
    if "traffic" in spec:
        shares = [[100], [60, 40], [50, 30, 20]]
        commits = sorted({one["commit"] for one in spec["traffic"]})
        spec["traffic"] = [
            {"commit": commit, "weight": share}
            for commit, share in zip(commits, shares[len(commits) - 1] if commits else [], strict=True)
        ]
    spec["rollout"] = {**spec.get("rollout", {}), "progressDeadlineSeconds": 3600}
    if spec.get("limits", {}).get("maxQueued") == 0:
        spec["limits"]["maxQueued"] = 1
    if "replicas" in spec:
        spec["replicas"] = spec["replicas"] and min(spec["replicas"], 1)
    return spec | {"model": {"name": "llama"}}


def service_specs() -> st.SearchStrategy[dict[str, Any]]:
    """Specs of InferenceServices of the Model ``llama``, as JSON."""
    info = inspect.type_info(ServiceSpec)
    assert isinstance(info, inspect.StructType)
    whole = st.tuples(struct(info), st.booleans()).map(lambda found: _coherent({**found[0], "apart": found[1]}))
    return whole.filter(_writable)


def _writable(spec: dict[str, Any]) -> bool:
    """Fails where it is not: then what is above does not know a rule."""
    return bool(service_spec({"metadata": {"name": "any"}, "spec": spec}))


def names(longest: int = 63) -> st.SearchStrategy[str]:
    return st.from_regex(r"\A[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z", alphabet=st.characters(max_codepoint=127)).map(
        lambda name: name[:longest].rstrip("-")
    )
