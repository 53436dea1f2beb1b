"""What types can't say: rules between fields, each in CEL for the API server and in Python for what is stored already.

The API server evaluates the CEL (``x-kubernetes-validations``) whenever a resource is written. The Python says the same
of a part that has been read: a resource may have been stored before a rule was made. A test holds both together.

Cost. Kubernetes refuses a definition whose rules may cost too much: 10,000,000 for one rule, 100,000,000 for all,
which it estimates from the longest list and text that the schema allows. So all of these have bounds. Its own
estimate (the validation of apiextensions-apiserver 1.36, run over our definitions) is 2,516,592 for the rule about
metadata.name, whose length no schema bounds (as it bounds none of a map's keys), 8,503 for the one that compares each
pair of ``steps``, 5,562 for a repository's parts, under 500 for any other; those about ``limits`` and ``kvStorage``
came after it. `make test-cluster` shows the definitions to a real API server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from helios import names
from helios.errors import InvalidInput
from orchestrator.api import model, service
from orchestrator.api.common import EnvironmentVariable, Part, Toleration

TRANSFERS = ("--kv-transfer-config", "--kv_transfer_config")
"""As vLLM takes the option."""
LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
KEY = rf"({LABEL}(\.{LABEL})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
"""Of a node's label."""


class Rule(msgspec.Struct, frozen=True):
    """``cel`` is about ``self``, the part; ``holds`` about the same part as its type, None for what compares with the
    part as it was before. ``field``: the one that the API server names, below the part; empty: the part itself."""

    cel: str
    message: str
    field: str = ""
    reason: Literal["FieldValueInvalid", "FieldValueRequired", "FieldValueForbidden"] = "FieldValueInvalid"
    holds: Callable[[Any], bool] | None = None

    def written(self) -> dict[str, str]:
        """As ``x-kubernetes-validations`` has it."""
        found = {"rule": self.cel, "message": self.message, "reason": self.reason}
        return found | ({"fieldPath": self.field} if self.field else {})


def _readable(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except InvalidInput:
        return False
    return True


def _needed(spec: service.ServiceSpec) -> int:
    """Accelerators of one worker of each role, or of as many as there always are of those that scale together."""
    its = [role for role in (spec.aggregated, spec.prefill, spec.decode) if role is not None]
    return sum(
        role.accelerator.count * (1 if role.scaling is not None else max(1, spec.scaling.min_replicas)) for role in its
    )


def _each(role: str) -> str:
    least = "self.scaling.minReplicas > 1 ? self.scaling.minReplicas : 1"
    return f"(has(self.{role}) ? self.{role}.accelerator.count * (has(self.{role}.scaling) ? 1 : {least}) : 0)"


def _stays(spec: service.ServiceSpec) -> bool:
    """Whether it never sleeps: its roles sleep together."""
    its = [role for role in (spec.aggregated, spec.prefill, spec.decode) if role is not None]
    return any((role.scaling or spec.scaling).min_replicas > 0 for role in its)


def _says_transfer(arguments: list[str]) -> bool:
    return any(one.startswith(TRANSFERS) for one in arguments)


def _stored(spec: service.ServiceSpec) -> bool:
    """Whether it is known where prefill and decode share blocks."""
    roles = [role for role in (spec.prefill, spec.decode) if role is not None]
    return (
        spec.engine.kv_storage is not None
        or _says_transfer(spec.engine.args)
        or all(_says_transfer(role.args) for role in roles)
    )


def _transfer(arguments: str) -> str:
    return f"{arguments}.exists(each, " + " || ".join(f"each.startsWith('{one}')" for one in TRANSFERS) + ")"


def _least(role: str) -> str:
    scaling = f"has(self.{role}.scaling) ? self.{role}.scaling.minReplicas : self.scaling.minReplicas"
    return f"(has(self.{role}) && ({scaling}) > 0)"


def _most(spec: service.ServiceSpec) -> int:
    """The most workers of the decode or only role."""
    role = spec.aggregated or spec.decode
    return (role.scaling if role is not None and role.scaling is not None else spec.scaling).max_replicas


def _labels(field: str, read: Callable[[Any], Mapping[str, str]]) -> Rule:
    """What the schema can't say of a map: how its keys are to be."""
    cel = KEY.replace("\\", "\\\\")
    return Rule(
        f"self.{field}.all(key, key.size() <= 317 && key.matches('^{cel}$'))",
        f"{field}: has a name that can't be a node's label: write it as nvidia.com/gpu.product",
        f".{field}",
        holds=lambda part: all(len(key) <= 317 and re.fullmatch(KEY, key) for key in read(part)),
    )


def _bytes(field: str, read: Callable[[Any], str]) -> Rule:
    """A quantity of memory: the suffix for thousandths is a slip, and none is no memory."""
    return Rule(
        f"type(self.{field}) == string ? !self.{field}.matches('m$|^0+([.]0+)?[a-zA-Z]*$') : self.{field} > 0",
        f"{field} has the suffix m, which is thousandths of a byte, or is nothing: write it as 16Gi",
        f".{field}",
        holds=lambda part: not re.search(r"m\Z|^0+([.]0+)?[a-zA-Z]*\Z", read(part)),
    )


RULES: dict[type[Part], tuple[Rule, ...]] = {
    model.Source: (
        Rule(
            "self.repo == oldSelf.repo",
            "repo can't be changed: another repository is another Model; make one, and name it in the services",
            ".repo",
        ),
        Rule(
            "self.repo.split('/').all(part, size(part) <= 96 && part != '_')",
            "repo: organisation and name have 96 characters each at the most, and neither is '_'",
            ".repo",
            holds=lambda source: _readable(names.RepoId.parse, source.repo),
        ),
    ),
    model.RevisionPolicy: (
        Rule(
            "!self.revision.contains('..') && !self.revision.contains('//')"
            " && !self.revision.endsWith('/') && !self.revision.endsWith('.lock')",
            "revision is no ref and no commit: it holds '..' or '//', or ends with '/' or '.lock'",
            ".revision",
            holds=lambda policy: _readable(names.check_revision, policy.revision),
        ),
        Rule(
            "self.policy == 'Pinned' || !self.revision.matches('^[0-9a-f]{40}$')",
            "policy: a commit never moves, so Follow and Approve have nothing to do; set policy to Pinned, or revision "
            "to a branch or tag",
            ".policy",
            holds=lambda policy: policy.policy == "Pinned" or not names.is_commit(policy.revision),
        ),
        Rule(
            "!has(self.approved) || self.policy == 'Approve'",
            "approved counts with policy Approve alone: set policy to Approve, or take approved out",
            ".approved",
            "FieldValueForbidden",
            holds=lambda policy: policy.approved is None or policy.policy == "Approve",
        ),
    ),
    model.Storage: (
        Rule(
            "self.volume != 'Claim' || has(self.storageClassName)",
            "storageClassName is missing: volume Claim needs the StorageClass of its claims (docs/kubernetes.md)",
            ".storageClassName",
            "FieldValueRequired",
            holds=lambda storage: storage.volume != "Claim" or storage.storage_class_name is not None,
        ),
        Rule(
            "self.volume == 'Claim' || !has(self.storageClassName)",
            "storageClassName counts with volume Claim alone: set volume to Claim, or take storageClassName out",
            ".storageClassName",
            "FieldValueForbidden",
            holds=lambda storage: storage.volume == "Claim" or storage.storage_class_name is None,
        ),
    ),
    EnvironmentVariable: (
        Rule(
            "!has(self.value) || self.value == '' || !has(self.valueFrom)",
            "value and valueFrom exclude each other: say one of them",
            ".valueFrom",
            "FieldValueForbidden",
            holds=lambda variable: not variable.value or variable.value_from is None,
        ),
    ),
    Toleration: (
        Rule(
            "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
            "key is missing: only operator Exists does without, and tolerates every taint then",
            ".key",
            "FieldValueRequired",
            holds=lambda each: each.key is not None or each.operator == "Exists",
        ),
        Rule(
            "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "value says nothing with operator Exists: take it out",
            ".value",
            "FieldValueForbidden",
            holds=lambda each: each.operator != "Exists" or not each.value,
        ),
        Rule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "tolerationSeconds counts with effect NoExecute alone: set effect to that, or take tolerationSeconds out",
            ".tolerationSeconds",
            "FieldValueForbidden",
            holds=lambda each: each.toleration_seconds is None or each.effect == "NoExecute",
        ),
    ),
    service.Engine: (
        Rule(
            "!has(self.kvStorage) || self.connector == 'shared-storage'",
            "kvStorage counts with connector shared-storage alone: set connector to that, or take kvStorage out",
            ".kvStorage",
            "FieldValueForbidden",
            holds=lambda engine: engine.kv_storage is None or engine.connector == "shared-storage",
        ),
    ),
    service.Targets: (
        Rule(
            "has(self.inFlight) || has(self.queued) || has(self.tokens) || has(self.kvUsagePercent)"
            " || has(self.ttftMilliseconds) || has(self.itlMilliseconds)",
            "targets names none: say one of inFlight, queued, tokens, kvUsagePercent, ttftMilliseconds and "
            "itlMilliseconds, or leave targets out for the usual ones",
            reason="FieldValueRequired",
            holds=lambda targets: targets != service.Targets(),
        ),
    ),
    service.Scaling: (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "minReplicas is more than maxReplicas: lower the one or raise the other",
            ".minReplicas",
            holds=lambda scaling: scaling.min_replicas <= scaling.max_replicas,
        ),
        Rule(
            "self.overprovision.replicas <= self.maxReplicas - self.minReplicas || self.minReplicas > self.maxReplicas",
            "overprovision.replicas and minReplicas are more than maxReplicas together: such room can't be had",
            ".overprovision.replicas",
            holds=lambda scaling: (
                scaling.min_replicas > scaling.max_replicas
                or scaling.overprovision.replicas <= scaling.max_replicas - scaling.min_replicas
            ),
        ),
        Rule(
            "self.forecast.mode != 'Act' || self.minReplicas < self.maxReplicas || self.minReplicas > self.maxReplicas",
            "forecast.mode Act has nothing to raise, as minReplicas is maxReplicas: raise maxReplicas, or set mode to "
            "Observe or Off",
            ".forecast.mode",
            holds=lambda scaling: scaling.forecast.mode != "Act" or scaling.min_replicas != scaling.max_replicas,
        ),
    ),
    service.Role: (
        Rule(
            "!has(self.scaling) || !has(self.scaling.maxCost) || self.scaling.maxCost >= self.accelerator.count"
            " * (self.scaling.minReplicas > 1 ? self.scaling.minReplicas : 1)",
            "scaling.maxCost is less than minReplicas workers' accelerator.count (one's at least): so many could never "
            "start; raise it, or lower minReplicas",
            ".scaling.maxCost",
            holds=lambda role: (
                role.scaling is None
                or role.scaling.max_cost is None
                or role.scaling.max_cost >= role.accelerator.count * max(1, role.scaling.min_replicas)
            ),
        ),
        _bytes("memory", lambda role: role.memory),
        _bytes("cache", lambda role: role.cache),
    ),
    service.Accelerator: (
        Rule(
            "self.resource.contains('/')",
            "resource has to be one of nodes', with its domain, as nvidia.com/gpu: cpu and memory have fields of their "
            "own",
            ".resource",
            holds=lambda accelerator: "/" in accelerator.resource,
        ),
    ),
    service.Placement: (_labels("nodeSelector", lambda placement: placement.node_selector),),
    model.Prefetch: (_labels("selector", lambda prefetch: prefetch.selector),),
    service.Rollout: (
        Rule(
            "self.steps.all(step, self.steps.exists_one(other, other == step)"
            " && self.steps[self.steps.filter(other, other < step).size()] == step)",
            "steps have to rise: write each share once, the smallest first",
            ".steps",
            holds=lambda rollout: sorted(set(rollout.steps)) == rollout.steps,
        ),
        Rule(
            "self.steps[self.steps.size() - 1] == 100",
            "steps have to end with 100: the new commit has all requests in the end",
            ".steps",
            holds=lambda rollout: rollout.steps[-1] == 100,
        ),
    ),
    service.ServiceSpec: (
        _bytes("engine.sharedMemory", lambda spec: spec.engine.shared_memory),
        Rule(
            "has(self.aggregated) || has(self.prefill) || has(self.decode)",
            "no workers: say aggregated (one kind of workers, {} is enough), or prefill and decode",
            reason="FieldValueRequired",
            holds=lambda spec: spec.aggregated or spec.prefill or spec.decode,
        ),
        Rule(
            "!has(self.aggregated) || !(has(self.prefill) || has(self.decode))",
            "aggregated excludes prefill and decode: say either the one or the two",
            ".aggregated",
            "FieldValueForbidden",
            holds=lambda spec: not spec.aggregated or not (spec.prefill or spec.decode),
        ),
        Rule(
            "!has(self.prefill) || has(self.decode) || has(self.aggregated)",
            "prefill needs decode: nobody else generates; add decode, or say aggregated instead",
            ".decode",
            "FieldValueRequired",
            holds=lambda spec: not spec.prefill or spec.decode or spec.aggregated,
        ),
        Rule(
            "!has(self.decode) || has(self.prefill) || has(self.aggregated)",
            "decode needs prefill: for workers that do both say aggregated instead",
            ".prefill",
            "FieldValueRequired",
            holds=lambda spec: not spec.decode or spec.prefill or spec.aggregated,
        ),
        Rule(
            "!has(self.prefill) || self.engine.connector != 'none'",
            "engine.connector is none, so prefill could not hand KV blocks to decode: name one, or say aggregated",
            ".engine.connector",
            holds=lambda spec: not spec.prefill or spec.engine.connector != "none",
        ),
        Rule(
            "!has(self.prefill) || self.engine.connector != 'shared-storage' || has(self.engine.kvStorage) || "
            + _transfer("self.engine.args")
            + f" || ({_transfer('self.prefill.args')} && has(self.decode) && {_transfer('self.decode.args')})",
            "engine.kvStorage is missing: connector shared-storage needs the claim of a volume that prefill and decode "
            "share, or --kv-transfer-config in engine.args that names another storage",
            ".engine.kvStorage",
            "FieldValueRequired",
            holds=lambda spec: not spec.prefill or spec.engine.connector != "shared-storage" or _stored(spec),
        ),
        Rule(
            "!has(self.engine.kvStorage) || has(self.prefill) || has(self.decode)",
            "engine.kvStorage is for prefill and decode apart: take it out, or say prefill and decode",
            ".engine.kvStorage",
            "FieldValueForbidden",
            holds=lambda spec: spec.engine.kv_storage is None or spec.prefill or spec.decode,
        ),
        Rule(
            "self.traffic.size() == 0 || self.traffic.map(each, each.weight).sum() == 100",
            "traffic: the weights have to be 100 together",
            ".traffic",
            holds=lambda spec: not spec.traffic or sum(each.weight for each in spec.traffic) == 100,
        ),
        Rule(
            "!has(self.replicas) || self.replicas <= ("
            "has(self.aggregated) && has(self.aggregated.scaling) ? self.aggregated.scaling.maxReplicas : "
            "!has(self.aggregated) && has(self.decode) && has(self.decode.scaling) ? self.decode.scaling.maxReplicas : "
            "self.scaling.maxReplicas)",
            "replicas is more than scaling.maxReplicas (of decode, or of the only role): raise that first",
            ".replicas",
            holds=lambda spec: spec.replicas is None or spec.replicas <= _most(spec),
        ),
        Rule(
            "!has(self.scaling.maxCost) || self.scaling.maxCost >= "
            + " + ".join(map(_each, ("aggregated", "prefill", "decode"))),
            "scaling.maxCost is less than accelerator.count of minReplicas workers of each role (one at least): so "
            "many could never start; raise it, or lower minReplicas",
            ".scaling.maxCost",
            holds=lambda spec: spec.scaling.max_cost is None or spec.scaling.max_cost >= _needed(spec),
        ),
        Rule(
            "self.rollout.progressDeadlineSeconds >= self.engine.startTimeoutSeconds",
            "rollout.progressDeadlineSeconds is less than engine.startTimeoutSeconds: every new commit would be given "
            "up while its workers start",
            ".rollout.progressDeadlineSeconds",
            holds=lambda spec: spec.rollout.progress_deadline_seconds >= spec.engine.start_timeout_seconds,
        ),
        Rule(
            "!has(self.limits.maxQueued) || self.limits.maxQueued > 0 || "
            + " || ".join(map(_least, ("aggregated", "prefill", "decode"))),
            "limits.maxQueued is 0, and minReplicas, too: a request that waits is what wakes a service; raise one of "
            "the two",
            ".limits.maxQueued",
            holds=lambda spec: spec.limits.max_queued is None or spec.limits.max_queued > 0 or _stays(spec),
        ),
    ),
}

NAMED = Rule(
    f"self.metadata.name.size() <= 63 && self.metadata.name.matches('^{LABEL}$')",
    "metadata.name: has to be a DNS label, 63 lower-case letters, digits and - at the most, and no dots: pods have it "
    "as a label",
    holds=lambda name: len(name) <= 63 and bool(re.fullmatch(LABEL, name)),
)
"""About each resource as a whole; ``holds`` is about its name."""


def rules_of(kind: type) -> tuple[Rule, ...]:
    """The rules about a part of this type itself."""
    return RULES.get(kind, ())


def misnamed(name: str) -> Iterator[str]:
    """What is wrong with the name of a resource."""
    if NAMED.holds is not None and not NAMED.holds(name):
        yield NAMED.message


def violations(part: Part, path: str) -> Iterator[str]:
    """What is wrong with a part and all below it, each with its path: ``spec.scaling.minReplicas: …``."""
    for rule in rules_of(type(part)):
        if rule.holds is not None and not rule.holds(part):
            yield f"{path}{rule.field}: {rule.message}"
    for name, written in zip(part.__struct_fields__, part.__struct_encode_fields__, strict=True):
        yield from _below(getattr(part, name), f"{path}.{written}")


def _below(value: object, path: str) -> Iterator[str]:
    if isinstance(value, Part):
        yield from violations(value, path)
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _below(each, f"{path}[{number}]")
