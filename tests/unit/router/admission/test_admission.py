"""Settings that can't work are refused; credentials are found where clients put them; an issuer's keys from a file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt import encode as jwt_encode
from jwt import get_algorithm_by_name

import helios.watched
from helios import jwks
from helios.config import (
    AdmissionSettings,
    JwtSettings,
    LimitSettings,
    QueueSettings,
    RegistrySettings,
    RoleSettings,
    RouterSettings,
    RouterTenantSettings,
    SharedLimitSettings,
    WorkerSettings,
)
from helios.errors import UsageError
from helios.metrics import RouterMetrics
from router.admission.admission import Admission, make
from router.admission.keys import create, revoke
from router.admission.rights import BACKGROUND, RANKS, Right
from router.checked import check
from router.errors import ApiError
from router.routes import RAW_ROUTES
from router.workers import Workers

CHAT = RAW_ROUTES[b"/v1/chat/completions"]


def built(ours: AdmissionSettings, **settings: Any) -> Admission:
    router = RouterSettings(workers=[WorkerSettings(model="m", url="http://w:1")], admission=ours, **settings)
    return Admission(router, Workers(router.workers, lambda: 0.0), RouterMetrics())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"keys": "/nowhere/keys"}, "can't be read"),
    ({"queue": QueueSettings(max_requests=0)}, "must be more than 0"),
    ({"queue": QueueSettings(per_worker=-1)}, "0 or more"),
    ({"output_tokens": 0}, "must be more than 0"),
    ({"models": {"m": LimitSettings(tokens_per_minute=-1)}}, r"models\.m\.tokens_per_minute"),
    ({"tenants": {"a": RouterTenantSettings()}}, "nobody would be a tenant"),
    ({"tenants": {"A b": RouterTenantSettings()}, "jwt": JwtSettings(jwks="x")}, "is not a name"),
    ({"tenants": {"a": RouterTenantSettings(weight=0)}, "jwt": JwtSettings(jwks="x")}, "weight"),
    ({"roles": {"a": RoleSettings()}}, "are for JWTs"),
    ({"jwt": JwtSettings(jwks="http://far/jwks", issuer="i", audience="a")}, "jwks"),
    ({"jwt": JwtSettings(jwks="/nowhere/jwks", issuer="i", audience="a")}, "can't be read"),
    ({"shared": SharedLimitSettings(url="host:6379")}, "redis://"),
]


@pytest.mark.parametrize(("ours", "part"), WRONG)
def test_settings_that_can_not_work(ours: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        built(AdmissionSettings(**ours))


def test_who_wakes_models_has_an_address() -> None:
    router = RouterSettings(
        workers=[WorkerSettings(model="m", url="http://w:1")], admission=AdmissionSettings(wake_url="ftp://h")
    )
    with pytest.raises(UsageError, match="wake_url"):
        check(router, RegistrySettings())


def test_an_alias_is_no_model() -> None:
    with pytest.raises(UsageError, match="is the name of a model"):
        built(AdmissionSettings(), aliases={"m": "x"})


def test_without_settings_there_is_no_admission() -> None:
    router = RouterSettings(workers=[WorkerSettings(model="m", url="http://w:1")])
    workers = Workers(router.workers, lambda: 0.0)
    assert make(router, workers, RouterMetrics()) is None


def test_credentials_are_found_where_clients_put_them(tmp_path: Path) -> None:
    _, text = create(tmp_path / "keys", "acme", 0.0)
    admission = built(AdmissionSettings(keys=str(tmp_path / "keys")))
    good = text.encode()
    for headers in (
        [(b"authorization", b"Bearer " + good)],
        [(b"authorization", b"bearer   " + good + b" ")],
        [(b"x-api-key", good), (b"accept", b"*/*")],
    ):
        assert admission.identify(headers).tenant == "acme"
    for headers, code in (
        ([], "missing_api_key"),
        ([(b"authorization", b"Basic " + good)], "invalid_api_key"),
        ([(b"authorization", b"Bearer \xff\xfe")], "invalid_api_key"),
        ([(b"authorization", b"")], "invalid_api_key"),
        ([(b"authorization", b"Bearer wrong"), (b"x-api-key", good)], "invalid_api_key"),
    ):
        with pytest.raises(ApiError) as caught:
            admission.identify(headers)
        assert (caught.value.status, caught.value.code) == (401, code)
        assert caught.value.challenge


def test_an_issuer_s_keys_from_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(helios.watched, "LOOK_AGAIN_S", 0.0)
    file, stranger = tmp_path / "jwks", ec.generate_private_key(ec.SECP256R1())

    def publish(kid: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        document = {"keys": [{**get_algorithm_by_name("ES256").to_jwk(key, as_dict=True), "kid": kid}]}
        (tmp_path / "new").write_text(json.dumps(document))
        (tmp_path / "new").replace(file)

    publish("1")
    admission = built(AdmissionSettings(jwt=JwtSettings(jwks=str(file), issuer="i", audience="a")))

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            admission.begin(group)
            verifier = admission._verifier
            assert verifier is not None
            while verifier._keys is None:
                await asyncio.sleep(0.005)
            assert verifier._keys.find("1") is not None
            publish("2")
            async with asyncio.timeout(10):
                while verifier._keys.find("2") is None:
                    await asyncio.sleep(0.005)
            file.write_text("{}")
            await asyncio.sleep(0.05)
            assert verifier._keys.find("2") is not None
            with pytest.raises(ApiError) as caught:  # a file can't be asked for newer keys
                verifier.find(jwt_encode({"iss": "i", "aud": "a"}, stranger, "ES256", {"kid": "3"}))
            assert caught.value.status == 401
            admission.end()

    asyncio.run(main())


def test_what_is_done_in_the_background_is_done_for_somebody_and_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key's rights and limits as long as the key is good, or with the rights that there were."""
    monkeypatch.setattr(helios.watched, "LOOK_AGAIN_S", 0.0)
    file = tmp_path / "keys"
    key, text = create(file, "acme", 0.0, models=["m"], limits={"requests_per_minute": 5})
    admission = built(AdmissionSettings(keys=str(file), tenants={"acme": RouterTenantSettings(models=["m*"])}))
    who = admission.on_behalf("acme", key.id, ())
    assert who is admission.on_behalf("acme", key.id, ())
    assert who.rank == BACKGROUND > max(RANKS.values())
    front = admission.identify([(b"x-api-key", text.encode())])
    assert admission.plan(who, "m") == admission.plan(front, "m") != ()  # the same buckets
    assert not who.may("n", CHAT.path)
    other = admission.on_behalf("acme", "", [Right(("m", "n"))])
    assert other.may("m", CHAT.path)
    assert not other.may("n", CHAT.path)  # the tenant may not
    assert admission.enter(CHAT, [], who).model == ""
    revoke(file, key.id)
    with pytest.raises(ApiError, match="revoked or expired"):
        admission.on_behalf("acme", key.id, ())
    assert built(AdmissionSettings()).on_behalf("", "", ()).rank == BACKGROUND
