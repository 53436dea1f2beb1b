"""csi.proto against the specification: names, numbers and types decide whether a kubelet understands us.

tests/golden/csi-1.12.txt has those of CSI 1.12 (tag v1.12.0) for every message, enumeration and call that we declare.
It was compared with the specification's own csi.proto when it was made, and changes only with the specification.
"""

from pathlib import Path

from csi import csi_pb2 as messages

GOLDEN = Path(__file__).parents[2] / "golden" / "csi-1.12.txt"


def described(file):
    """A line for each field, value and call."""

    def of_message(message):
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
    for service in file.services_by_name.values():
        for method in service.methods:
            yield f"{method.full_name}({method.input_type.full_name}) -> {method.output_type.full_name}"


def test_everything_that_is_declared_is_as_the_specification_has_it():
    golden = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    assert sorted(described(messages.DESCRIPTOR)) == golden


def test_what_we_do_not_know_of_is_kept():
    data = messages.NodeGetInfoResponse(node_id="n").SerializeToString() + b"\xfa\x01\x03new"  # field 31
    assert messages.NodeGetInfoResponse.FromString(data).SerializeToString() == data
