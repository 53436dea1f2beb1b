"""x-kubernetes-validations, by Google's own CEL (the package cel-expr-python).

Source: kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions, "Validation rules".
``self`` is the value where the rule stands. A rule that names ``oldSelf`` is about updates, and only where old and new
value can be told to be the same thing: not below atomic lists. Simplified: expressions are not checked against the
types of the schema when a CRD is made (a field that is not declared shows when the rule runs), and of Kubernetes' own
libraries there are strings, math, optionals and the sum of a list, not quantities, URLs, IPs and sorting.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from cel_expr_python import cel
from cel_expr_python.ext import ext_math, ext_optional, ext_strings

from tests.fakes.kubernetes.schema import MAP, Schema

RESERVED = frozenset([
    "true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if", "import", "let",
    "loop", "package", "namespace", "return",
])  # fmt: skip
MISSING = object()


@functools.cache
def _environment() -> Any:
    dynamic = cel.Type.DYN
    extensions = [ext_strings.ExtStrings(), ext_math.ExtMath(), ext_optional.ExtOptional()]
    total = cel.Overload("list_sum", cel.Type.INT, [cel.Type.LIST], is_member=True, impl=_sum)
    functions = [cel.FunctionDecl("sum", [total])]
    variables = {"self": dynamic, "oldSelf": dynamic}
    return cel.NewEnv(variables=variables, extensions=extensions, functions=functions)


def _sum(values: Any) -> int:
    """Of Kubernetes' library of lists, for whole numbers."""
    return sum(one.plain_value() if isinstance(one, cel.Value) else one for one in values)


@functools.cache
def compiled(expression: str) -> Any:
    """Raises ValueError for what is no CEL."""
    try:
        return _environment().compile(expression)
    except Exception as error:
        raise ValueError(str(error)) from None


def rules_of(schema: Schema, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All rules of a schema, with where they stand."""
    for rule in schema.marked("validations") or ():
        yield path, rule
    node = schema.node
    for name, inner in (node.get("properties") or {}).items():
        yield from rules_of(Schema(inner), f"{path}.{name}" if path else name)
    for part in ("items", "additionalProperties"):
        if isinstance(node.get(part), dict):
            yield from rules_of(Schema(node[part]), f"{path}[*]")


def wrong(value: Any, old: Any, schema: Schema, path: str = "") -> Iterator[tuple[str, str]]:
    """The rules that do not hold: where, and what is said of it. ``old``: the former value, or ``MISSING``."""
    if not schema.ruled:
        return
    data = {"self": _value(value, schema)} if schema.rules else {}
    if schema.rules and old is not MISSING:
        data["oldSelf"] = _value(old, schema)
    for rule in schema.rules:
        if old is MISSING and _about_updates(rule["rule"]) and not rule.get("optionalOldSelf"):
            continue
        said = compiled(rule["rule"]).eval(data=data).value()
        if said is not True:
            yield f"{path}{rule.get('fieldPath', '')}", f"Invalid value: {_message(rule, data, said)}"
    if isinstance(value, dict):
        for name, one in value.items():
            inner = schema.field(name)
            if inner is not None:
                before = old.get(name, MISSING) if isinstance(old, dict) else MISSING
                yield from wrong(one, before, inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        by_key = schema.list_type == MAP and isinstance(old, list)
        there = {schema.key(one): one for one in old} if by_key else {}
        for at, one in enumerate(value):
            before = there.get(schema.key(one), MISSING) if by_key else MISSING
            yield from wrong(one, before, schema.element, f"{path}[{at}]")


def _message(rule: dict[str, Any], data: dict[str, Any], said: Any) -> str:
    if not isinstance(said, bool):
        return f"rule evaluation error: {said}: {rule['rule']}"
    if "messageExpression" in rule:
        return str(compiled(rule["messageExpression"]).eval(data=data).value())
    return str(rule.get("message") or f"failed rule: {rule['rule']}")


def _value(value: Any, schema: Schema) -> Any:
    """As CEL sees it: ``number`` is a double, and field names that it can't have are escaped."""
    if isinstance(value, dict):
        declared = schema.node.get("properties") or {}
        return {
            (_escaped(name) if name in declared else name): _value(one, schema.field(name) or _UNKNOWN)
            for name, one in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [_value(one, schema.element) for one in value]
    if schema.node.get("type") == "number" and not isinstance(value, bool) and isinstance(value, int):
        return float(value)
    return value


_UNKNOWN = Schema({})


@functools.cache
def _about_updates(rule: str) -> bool:
    return bool(re.search(r"\boldSelf\b", rule))


@functools.cache
def _escaped(name: str) -> str:
    if name in RESERVED:
        return f"__{name}__"
    for text, word in (("__", "__underscores__"), (".", "__dot__"), ("-", "__dash__"), ("/", "__slash__")):
        name = name.replace(text, word)
    return name
