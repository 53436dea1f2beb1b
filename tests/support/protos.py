"""What a compiled .proto file declares, as text: names, numbers and types decide whether others understand us."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def described(file: Any) -> Iterator[str]:
    """A line for each field, value and call."""

    def of_message(message: Any) -> Iterator[str]:
        for field in message.fields:
            kind = field.message_type or field.enum_type
            oneof = f" in {field.containing_oneof.name}" if field.containing_oneof else ""
            many = "repeated " if field.is_repeated else ""
            yield f"{field.full_name} = {field.number} {many}{kind.full_name if kind else field.type}{oneof}"
        for nested in message.nested_types:
            yield from of_message(nested)
        for enum in message.enum_types:
            yield from (f"{enum.full_name}.{value.name} = {value.number}" for value in enum.values)

    for message in file.message_types_by_name.values():
        yield from of_message(message)
    for enum in file.enum_types_by_name.values():
        yield from (f"{enum.full_name}.{value.name} = {value.number}" for value in enum.values)
    for service in file.services_by_name.values():
        for method in service.methods:
            yield f"{method.full_name}({method.input_type.full_name}) -> {method.output_type.full_name}"
