"""csi.proto against the specification: names, numbers and types decide whether a kubelet understands us.

tests/golden/csi-1.12.txt has those of CSI 1.12 (tag v1.12.0) for every message, enumeration and call that we declare.
It was compared with the specification's own csi.proto when it was made, and changes only with the specification.
"""

from pathlib import Path

from csi import csi_pb2 as messages
from tests.support.protos import described

GOLDEN = Path(__file__).parents[2] / "golden" / "csi-1.12.txt"


def test_everything_that_is_declared_is_as_the_specification_has_it():
    golden = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    assert sorted(described(messages.DESCRIPTOR)) == golden


def test_what_we_do_not_know_of_is_kept():
    data = messages.NodeGetInfoResponse(node_id="n").SerializeToString() + b"\xfa\x01\x03new"  # field 31
    assert messages.NodeGetInfoResponse.FromString(data).SerializeToString() == data
