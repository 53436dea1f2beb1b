"""The types and the definitions say the same: whatever the one takes the other takes, and both read it alike."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from orchestrator.api import parse
from orchestrator.api.crds import definitions
from orchestrator.api.rules import NAMED, RULES
from tests.support.admission import Admission, Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = [
    "", "a", "main", "org/name", "org--x/y", "_/x", "x/..y", "a.b-c_d/e", "refs/pr/1", "a..b", "x.lock", "a/", COMMIT,
    "f" * 40, "f" * 41, "4", "500m", "500M", "1.5Gi", "16gb", "-1", "nvidia.com/gpu", "A B", "é", "a\n", "x" * 97,
    "x" * 300, "name.with.dots", "UPPER", "-", "a-", "registry.example/image:1",
]  # fmt: skip
ODD = [None, "", "x", 0, -1, 7.5, True, [], {}, ["x"], {"x": 1}, [None]]
Schema = dict[str, Any]
KINDS = {each["spec"]["names"]["kind"]: Admission(each) for each in definitions().values()}
SPECS: dict[str, Schema] = {
    each["spec"]["names"]["kind"]: each["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for each in definitions().values()
}
READ = {"Model": parse.model_spec, "InferenceService": parse.service_spec}


def made(dice: random.Random, schema: Schema, wrong: float) -> Any:
    """A value that fits a schema, but for a share ``wrong`` of its parts: beyond a bound, or of another type."""
    if dice.random() < wrong / 2:
        return dice.choice(ODD)
    if "enum" in schema:
        return dice.choice(schema["enum"])
    if schema.get("x-kubernetes-int-or-string") and dice.random() < 0.5:
        return dice.choice([0, 1, 4])
    match schema.get("type", "string"):
        case "boolean":
            return dice.random() < 0.5
        case "integer":
            least, most = schema["minimum"], schema.get("maximum", 9)
            beyond = [least - 1, most + 1]
            usual = [least, min(least + 1, most), min(2, most), min(4, most), min(900, most), most]
            return dice.choice(beyond if dice.random() < wrong else [each for each in usual if each >= least])
        case "string":
            fits = [text for text in TEXTS if _fits(text, schema)]
            return dice.choice(TEXTS if dice.random() < wrong or not fits else fits)
        case "array":
            if schema["items"].get("maximum") == 100:  # steps
                return dice.choice([[100], [10, 50, 100], [1, 99, 100], [], [10], [50, 5, 100], [5, 5, 100]])
            if "weight" in schema["items"].get("properties", {}):  # traffic
                two = [{"commit": "f" * 40, "weight": 40}, {"commit": COMMIT, "weight": dice.choice([60, 60, 60, 50])}]
                return dice.choice([[], two, two, two * 2])
            return [made(dice, schema["items"], wrong) for _ in range(dice.randrange(3))]
    return made_object(dice, schema, wrong)


def made_object(dice: random.Random, schema: Schema, wrong: float) -> dict[str, Any]:
    if isinstance(schema.get("additionalProperties"), dict):
        return {
            text: made(dice, schema["additionalProperties"], wrong) for text in dice.sample(TEXTS, dice.randrange(3))
        }
    if "properties" not in schema:
        return {"free": {"form": [1, None]}}
    needed = schema.get("required", [])
    chosen = [name for name in schema["properties"] if name in needed or dice.random() < 0.35]
    if "aggregated" in schema["properties"] and dice.random() > wrong:
        chosen = [name for name in chosen if name not in ("aggregated", "prefill", "decode")]
        chosen += dice.choice((["aggregated"], ["prefill", "decode"]))
    found = {name: made(dice, schema["properties"][name], wrong) for name in chosen}
    if dice.random() < wrong / 4:
        found["unknown"] = 1
    if dice.random() < wrong / 4 and found:
        del found[dice.choice(sorted(found))]
    return found


def _fits(text: str, schema: Schema) -> bool:
    longest, pattern = schema.get("maxLength", 1000), schema.get("pattern", "")
    return schema.get("minLength", 0) <= len(text) <= longest and bool(re.search(pattern.replace("$", r"\Z"), text))


def accepted(kind: str, manifest: dict[str, Any]) -> dict[str, Any] | str:
    try:
        return KINDS[kind].admit(manifest)
    except Refused as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 40), wrong=st.sampled_from([0.0, 0.0, 0.01, 0.1]))
def test_what_the_one_takes_the_other_takes(kind: str, seed: int, wrong: float):
    spec = made(random.Random(seed), SPECS[kind], wrong)
    manifest = {"apiVersion": "helios.dev/v1alpha1", "kind": kind, "metadata": {"name": "name"}, "spec": spec}
    stored = accepted(kind, manifest)
    event("refused" if isinstance(stored, str) else "stored")
    try:
        read, invalid = READ[kind](manifest), ""
    except parse.InvalidResource as error:
        read, invalid = None, str(error)
    if isinstance(stored, str):
        assert invalid, f"refused by the definition alone: {stored}"
        return
    assert not invalid, f"refused by the types alone: {invalid}"
    assert READ[kind](stored) == read
    assert accepted(kind, stored) == stored, "what is stored may be written again"


def test_every_rule_can_be_asked_of_what_is_stored_but_those_about_changes():
    rules = [rule for each in RULES.values() for rule in each] + [NAMED]
    assert [rule.cel for rule in rules if rule.holds is None] == ["self.repo == oldSelf.repo"]
