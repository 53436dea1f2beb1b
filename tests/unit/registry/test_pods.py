"""Pods' tokens: those that a known cluster has signed for us are taken, and nothing else is."""

import asyncio

import jwt
import pytest

from helios.config import ClusterSettings
from helios.errors import Unauthorized, Unavailable, UsageError
from registry import pods
from registry.pods import Pod, PodTokens
from tests.support.pod_tokens import ISSUER, Issuer


@pytest.fixture(params=["RS256", "ES256"])
def issuer(request):
    return Issuer(request.param)


def cluster(signer, file, **more):
    return {"c": ClusterSettings(**{"jwks": str(signer.write(file)), "issuer": ISSUER, **more})}


@pytest.fixture
def tokens(issuer, tmp_path):
    return PodTokens(cluster(issuer, tmp_path / "jwks.json"))


def find(tokens, token):
    return asyncio.run(tokens.find(token))


def test_a_token_says_which_namespace_and_which_pod_it_is_of(issuer, tokens):
    assert find(tokens, issuer.sign("acme")) == Pod("acme", "default", "pod-uid")
    unbound = {"namespace": "acme", "serviceaccount": {"name": "default", "uid": "u"}}
    assert find(tokens, issuer.sign("acme", **{"kubernetes.io": unbound})) == Pod("acme", "default", "")


# Fixed, since a table is made when tests are collected, which may be an hour before one of them runs.
LONG_AGO, FAR_OFF = 1_000_000_000, 4_000_000_000  # 2001 and 2096

BAD = {
    "another audience": ({"aud": ["https://kubernetes.default.svc"]}, "another audience"),
    "no audience": ({"aud": None}, "no aud"),
    "expired": ({"exp": LONG_AGO}, "expired"),
    "not yet": ({"nbf": FAR_OFF, "exp": FAR_OFF + 60}, "not valid yet"),
    "no end": ({"exp": None}, "no exp"),
    "a user's": ({"sub": "alice"}, "no service account's"),
    "a subject that is no text": ({"sub": None}, "no service account's"),
    "no claims of Kubernetes": ({"kubernetes.io": None}, "no service account's"),
    "another namespace than the subject's": (
        {"kubernetes.io": {"namespace": "rival", "serviceaccount": {"name": "default"}}}, "contradict"
    ),
    "another account than the subject's": (
        {"kubernetes.io": {"namespace": "acme", "serviceaccount": {"name": "admin"}}}, "contradict"
    ),
    "a pod that is none": (
        {"kubernetes.io": {"namespace": "acme", "serviceaccount": {"name": "default"}, "pod": 3}}, "malformed"
    ),
    "another issuer": ({"iss": "https://elsewhere"}, "no cluster that this registry knows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_signed_token_that_is_not_for_this_is_refused(issuer, tokens, name):
    claims, why = BAD[name]
    with pytest.raises(Unauthorized, match=why) as error:
        find(tokens, token := issuer.sign("acme", **claims))
    assert token not in str(error.value)


def test_a_token_that_the_cluster_has_not_signed_is_refused(issuer, tokens):
    good = issuer.sign("acme")
    header, _, signature = good.split(".")
    claims = issuer.sign("rival").split(".")[1]
    stranger = Issuer(issuer.algorithm)
    none = jwt.encode(issuer.claims("acme"), None, "none")
    for forged in (f"{header}.{claims}.{signature}", stranger.sign("acme"), none, good[:-8], "a.b.c", "", "x" * 9000):
        with pytest.raises(Unauthorized):
            find(tokens, forged)


def test_a_registry_without_clusters_takes_none(issuer):
    with pytest.raises(Unauthorized, match="takes no pods' tokens"):
        find(PodTokens({}), issuer.sign())


def test_tokens_of_several_clusters_are_held_against_their_own_keys(tmp_path):
    west, east = Issuer("ES256", "https://west"), Issuer("ES256", "https://east")
    settings = {
        each.issuer[8:]: ClusterSettings(jwks=str(each.write(tmp_path / each.issuer[8:])), issuer=each.issuer)
        for each in (west, east)
    }
    tokens = PodTokens(settings)
    assert find(tokens, west.sign("a")).namespace == "a"
    assert find(tokens, east.sign("b")).namespace == "b"
    with pytest.raises(Unauthorized, match="signature"):
        find(tokens, west.sign("a", iss="https://east"))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"issuer": ""}, "needs jwks, issuer and audience"),
        ({"audience": ""}, "needs jwks, issuer and audience"),
        ({"jwks": "/nowhere/jwks"}, "can't be read"),
        ({"jwks": "http://far/jwks"}, r"registry\.clusters\.c\.jwks"),
        ({"jwks": "https://far/jwks", "ca_file": "/nowhere/ca.crt"}, "certificates"),
        ({"jwks": "https://far/jwks", "token_file": "/nowhere/token"}, "token file"),
    ],
)
def test_settings_that_would_let_others_pass_or_nobody_are_refused(tmp_path, settings, wrong):
    with pytest.raises(UsageError, match=wrong):
        PodTokens(cluster(Issuer("ES256"), tmp_path / "jwks", **settings))


def test_two_clusters_can_not_have_one_issuer(tmp_path):
    (settings,) = cluster(Issuer("ES256"), tmp_path / "jwks").values()
    with pytest.raises(UsageError, match="another cluster has the issuer"):
        PodTokens({"a": settings, "b": settings})


# --- keys that are fetched ---


def running(work, tokens):
    async def main():
        task = asyncio.create_task(tokens.run())
        try:
            return await work()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return asyncio.run(main())


def test_the_first_token_waits_for_the_keys_and_later_ones_need_none(tmp_path):
    (tmp_path / "token").write_text("the-registry's-own\n")
    with Issuer("ES256") as issuer:
        settings = ClusterSettings(jwks=issuer.url, issuer=ISSUER, token_file=str(tmp_path / "token"))
        tokens = PodTokens({"c": settings})

        async def work():
            assert (await tokens.find(issuer.sign("acme"))).namespace == "acme"
            issuer.away = True
            assert (await tokens.find(issuer.sign("rival"))).namespace == "rival"

        running(work, tokens)
        assert issuer.asked == 1
        assert issuer.seen[-1] == "Bearer the-registry's-own"


def test_a_new_key_is_fetched_and_strangers_do_not_drive_it(monkeypatch):
    from helios import jwks, jwts

    monkeypatch.setattr(jwks, "ASK_AGAIN_S", 0.2)
    monkeypatch.setattr(jwts, "ASK_AGAIN_S", 0.2)
    with Issuer("ES256") as issuer:
        tokens = PodTokens({"c": ClusterSettings(jwks=issuer.url, issuer=ISSUER)})

        async def work():
            await tokens.find(issuer.sign("acme"))
            old = issuer.sign("acme")
            issuer.rotate("second")
            await asyncio.sleep(0.3)
            assert (await tokens.find(issuer.sign("acme"))).namespace == "acme"
            asked, stranger = issuer.asked, Issuer("ES256")
            stranger.rotate("unknown")
            for _ in range(50):  # within the time in which nobody asks again
                with pytest.raises(Unauthorized, match="not one of the issuer's"):
                    await tokens.find(stranger.sign("acme"))
            assert issuer.asked == asked
            with pytest.raises(Unauthorized, match="not one of the issuer's"):
                await tokens.find(old)

        running(work, tokens)


def test_a_cluster_that_is_away_from_the_beginning_is_no_reason_to_refuse_for_good(monkeypatch):
    monkeypatch.setattr(pods, "LOOKED_S", 0.5)
    with Issuer("ES256") as issuer:
        issuer.away = True
        tokens = PodTokens({"c": ClusterSettings(jwks=issuer.url, issuer=ISSUER)})

        async def work():
            with pytest.raises(Unavailable, match="keys can't be fetched"):
                await tokens.find(issuer.sign("acme"))

        running(work, tokens)
