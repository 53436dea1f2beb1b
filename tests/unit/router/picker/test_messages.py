"""ext_proc.proto against Envoy's API: names, numbers and types decide whether a gateway understands us.

tests/golden/ext-proc-v3.txt has those of Envoy 1.40 for every message, field and enumeration that we declare, without
the packages. It was compared with Envoy's own descriptors when it was made (where a status is an enumeration whose
numbers are HTTP's codes, as on the wire), and changes only with Envoy's API.
"""

from pathlib import Path

from router.picker import ext_proc_pb2 as messages
from tests.support.protos import described

GOLDEN = Path(__file__).parents[3] / "golden" / "ext-proc-v3.txt"
PACKAGE = "helios.ext_proc.v3."


def test_everything_that_is_declared_is_as_envoy_has_it():
    golden = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    assert sorted(line.replace(PACKAGE, "") for line in described(messages.DESCRIPTOR)) == golden


def test_nobody_elses_messages_are_in_the_way():
    """In one process with whoever has Envoy's own, two of one name would be refused."""
    assert {name.rsplit(".", 1)[0] for name in (messages.ProcessingRequest.DESCRIPTOR.full_name,)} == {PACKAGE[:-1]}
