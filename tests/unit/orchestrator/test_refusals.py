"""What refusals of the API server mean: real ones of Kubernetes 1.36, word for word."""

import pytest

from helios.kube.reflector import Refused
from orchestrator.runtime import refusals

UID = (
    'ConfigMap "u1" is invalid: metadata.uid: Invalid value: "00000000-0000-0000-0000-000000000000": field is immutable'
)


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (422, UID, refusals.CONFLICT),
        (422, 'Deployment.apps "x" is invalid: spec.replicas: Invalid value: -1', refusals.INVALID),
        (403, 'pods "x" is forbidden: exceeded quota: few, requested: pods=1, used: pods=2', refusals.QUOTA),
        (403, 'pods is forbidden: User "u" cannot create resource "pods"', refusals.FORBIDDEN),
        (409, "the object has been modified", refusals.CONFLICT),
        (429, "too many requests", refusals.TOO_MANY),
        (503, "not now", refusals.UNAVAILABLE),
    ],
)
def test_each_has_its_name(status: int, message: str, reason: str) -> None:
    refused = Refused(message)
    refused.status = status
    found = refusals.failure("it can't be written", refused)
    assert (found.code, found.message) == (reason, f"it can't be written: {message}")
