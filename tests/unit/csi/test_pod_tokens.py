"""The pod's token as Kubernetes sends it, and what is asked of the registry with it."""

import asyncio
import json

import pytest

from csi.calls import Calls
from csi.errors import Precondition
from csi.pod_tokens import KEY, token_for
from csi.rights import AWAY_S, NAMESPACE, POD_UID, Rights
from csi.until import Until
from helios.errors import Forbidden, InvalidInput, Unauthorized, Unavailable
from helios.metrics import CsiMetrics
from helios.names import RepoId
from helios.registry_answers import PodAllowed

REPO = RepoId.parse("acme/secret")


def sent(token, audience="helios"):
    return {KEY: json.dumps({audience: {"token": token, "expirationTimestamp": "2026-01-01T00:00:00Z"}})}


def test_the_token_for_our_audience_is_taken_and_secrets_count_before_the_context():
    both = json.dumps({"other": {"token": "theirs"}, "helios": {"token": "ours"}})
    assert token_for("helios", {KEY: both}, {}).reveal() == "ours"
    assert token_for("helios", sent("a pod's own attribute"), sent("the-kubelet's")).reveal() == "the-kubelet's"


@pytest.mark.parametrize(
    ("context", "error", "saying"),
    [
        ({}, Precondition, r'tokenRequests: \[\{audience: "helios"\}\]'),
        (sent("t", "other"), Precondition, "none for the audience 'helios'"),
        ({KEY: "sesame"}, InvalidInput, "not as Kubernetes writes it"),
        ({KEY: '{"helios": "sesame"}'}, InvalidInput, "not as Kubernetes writes it"),
        ({KEY: '{"helios": {"token": ""}}'}, InvalidInput, "is none"),
        (sent("sesame" * 2000), InvalidInput, "is none"),
        (sent("sésame"), InvalidInput, "is none"),
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(context, error, saying):
    with pytest.raises(error, match=saying) as caught:
        token_for("helios", context, {})
    assert "sesame" not in str(caught.value)


def test_a_token_does_not_show_itself():
    token = token_for("helios", sent("sesame"), {})
    assert "sesame" not in f"{token} {token!r} {[token]} {token.digest}"


class Registry:
    """Knows of tokens whose they are, and which namespaces may read."""

    def __init__(self):
        self.pods = {"acme-1": ("acme", "u1"), "acme-2": ("acme", "u2"), "rival-1": ("rival", "u3")}
        self.may, self.away, self.asked = {"acme"}, False, 0

    def pod_allowed(self, repo, token):
        self.asked += 1
        if self.away:
            raise Unavailable("away")
        if token.reveal() not in self.pods:
            raise Unauthorized("the pod's token is not accepted: it has expired")
        namespace, uid = self.pods[token.reveal()]
        allowed = namespace in self.may
        return PodAllowed(allowed, None if allowed else "it is another tenant's", namespace, "default", uid)


class World:
    def __init__(self):
        self.registry, self.now = Registry(), 0.0
        self.rights = Rights(self.registry, Calls(), CsiMetrics(), "token", "helios")
        self.rights._remembered._clock = lambda: self.now

    def check(self, token, **told):
        context = {{"namespace": NAMESPACE, "uid": POD_UID}[name]: value for name, value in told.items()}
        asyncio.run(self.rights.check(REPO, context, sent(token), Until(5)))


def test_the_tokens_namespace_decides_whatever_the_node_says():
    world = World()
    world.check("acme-1")
    with pytest.raises(Forbidden, match=r"namespace rival may not read acme/secret: .*another tenant's"):
        world.check("rival-1")
    with pytest.raises(Forbidden, match="another pod's, of the namespace rival"):
        world.check("rival-1", namespace="acme")
    with pytest.raises(Forbidden, match="another pod's, of the namespace acme"):
        world.check("acme-2", namespace="acme", uid="u1")
    world.check("acme-2", namespace="acme", uid="u2")
    for told in ({"namespace": "rival", "uid": "u3"}, {"namespace": "acme", "uid": "u1"}):
        with pytest.raises(Forbidden, match="another pod's"):  # though the token has just been taken
            world.check("acme-2", **told)
    with pytest.raises(Unauthorized, match="expired"):
        world.check("a-changed-one", namespace="acme")


def test_a_token_is_asked_about_once_a_minute_and_a_right_that_is_taken_away_counts_then():
    world = World()
    for _ in range(5):
        world.check("acme-1", namespace="acme", uid="u1")
    assert world.registry.asked == 1
    world.registry.may.clear()
    world.now = 60
    with pytest.raises(Forbidden):
        world.check("acme-1", namespace="acme", uid="u1")
    with pytest.raises(Forbidden):
        world.check("acme-1", namespace="acme", uid="u1")


def test_while_the_registry_is_away_what_a_namespace_had_proved_counts_for_a_day():
    world = World()
    world.check("acme-1", namespace="acme", uid="u1")
    world.registry.away, world.now = True, 3600
    world.check("acme-1", namespace="acme", uid="u1")
    world.check("acme-2", namespace="acme", uid="u2")  # a new pod's
    with pytest.raises(Unavailable):
        world.check("acme-2")  # nobody tells the namespace
    with pytest.raises(Unavailable):
        world.check("rival-1", namespace="rival", uid="u3")
    world.now = AWAY_S
    with pytest.raises(Unavailable):
        world.check("acme-1", namespace="acme", uid="u1")
