"""API keys: shown once, known by their hash, changed under a running router."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from helios.config import AdmissionSettings, LimitSettings, RouterTenantSettings
from helios.errors import NotFound, UsageError
from helios.watched import LOOK_AGAIN_S
from router.admission.holders import REMEMBERED, Keys
from router.admission.keys import create, read, revoke
from router.admission.rights import RANKS, Tenants


class Scene:
    def __init__(self, path: Path, **settings: object) -> None:
        self.now = self.clock = 1000.0
        tenants = Tenants(AdmissionSettings(**settings))  # type: ignore[arg-type]
        self.keys = Keys(path, tenants, lambda: self.now, lambda: self.clock)


def test_a_key_is_found_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key, text = create(
        file, "acme", 5.0, models=["org/*"], routes=["/v1/chat/*"], priority="high", limits={"tokens_per_minute": 9}
    )
    scene = Scene(file, tenants={"acme": RouterTenantSettings(weight=3, limits=LimitSettings(requests_per_minute=7))})
    who = scene.keys.find(text)
    assert who is not None
    assert (who.tenant, who.key, who.weight, who.rank) == ("acme", key.id, 3, RANKS["high"])
    assert (who.key_limits.tokens_per_minute, who.tenant_limits.requests_per_minute) == (9, 7)
    assert who.may("org/a", "/v1/chat/completions")
    assert not who.may("other/a", "/v1/chat/completions")
    assert not who.may("org/a", "/v1/embeddings")
    for other in ("", text[:-1], text + "x", text.upper(), key.id, key.digest, "ä", "\udce4", "x" * 100_000):
        assert scene.keys.find(other) is None


def test_the_file_tells_nobody_a_key_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    _, one = create(file, "a", 0.0)
    _, other = create(file, "a", 0.0)
    content = file.read_text()
    assert one.rpartition("-")[2] not in content
    assert file.stat().st_mode & 0o777 == 0o600
    assert one != other
    # The same key under another salt has another digest: files can't be compared with each other.
    document = json.loads(content)
    document["salt"] = "00" * 32
    file.write_text(json.dumps(document))
    assert Scene(file).keys.find(one) is None


def test_keys_come_and_go_while_the_router_runs(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first, text = create(file, "a", 0.0)
    scene = Scene(file)
    _, later = create(file, "b", 0.0)
    revoke(file, first.id)
    scene.clock += LOOK_AGAIN_S
    assert scene.keys.find(text) is None
    assert scene.keys.find(later) is not None
    with pytest.raises(NotFound, match=first.id):
        revoke(file, first.id)
    file.write_text("{")
    scene.clock += LOOK_AGAIN_S
    assert scene.keys.find(later) is not None


def test_a_key_expires(tmp_path: Path) -> None:
    _, text = create(tmp_path / "keys", "a", 0.0, expires=2000.0)
    scene = Scene(tmp_path / "keys")
    header = b"x-api-key", text.encode()
    assert scene.keys.find(text, header) is scene.keys.sender(header) is not None
    scene.now = 2000.0
    assert scene.keys.find(text) is None
    assert scene.keys.sender(header) is None


def test_a_header_that_is_known_is_nobody_s_any_more_when_its_key_is_revoked_or_its_rights_change(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys"
    first, text = create(file, "a", 0.0, models=["old"])
    _, other = create(file, "b", 0.0)
    scene = Scene(file)
    headers = [(b"authorization", b"Bearer " + one.encode()) for one in (text, other)]
    assert scene.keys.sender(headers[0]) is None, "nobody sent it yet"
    found = [scene.keys.find(one, header) for one, header in zip((text, other), headers, strict=True)]
    assert [scene.keys.sender(header) for header in headers] == found
    assert None not in found
    assert scene.keys.sender((b"x-api-key", headers[0][1])) is None, "the same bytes mean another thing there"
    document = json.loads(file.read_text())
    document["keys"][0]["models"] = ["new"]
    file.write_text(json.dumps(document))
    scene.clock += LOOK_AGAIN_S
    assert scene.keys.sender(headers[0]) is None
    again = scene.keys.find(text, headers[0])
    assert again is not None
    assert again.may("new", "/v1/completions")
    assert scene.keys.sender(headers[0]) is again
    revoke(file, first.id)
    scene.clock += LOOK_AGAIN_S
    assert scene.keys.sender(headers[0]) is None
    assert scene.keys.find(text, headers[0]) is None
    assert scene.keys.sender(headers[0]) is None


def test_headers_that_are_remembered_have_a_bound(tmp_path: Path) -> None:
    _, text = create(tmp_path / "keys", "a", 0.0)
    scene = Scene(tmp_path / "keys")
    spaces = [(b"authorization", b"Bearer" + b" " * n + text.encode()) for n in range(1, 2 * REMEMBERED)]
    for header in spaces:
        assert scene.keys.find(text, header) is not None
    assert 0 < sum(scene.keys.sender(header) is not None for header in spaces) <= REMEMBERED


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    threads = [threading.Thread(target=create, args=(tmp_path / "keys", f"t{i}", 0.0)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.tenant for key in read(tmp_path / "keys").keys) == [f"t{i}" for i in range(8)]


@pytest.mark.parametrize(
    "content",
    [None, b"", b"[]", b'{"version":2,"salt":"' + b"00" * 32 + b'"}', b'{"version":1,"salt":"00"}', b"\xff",
     b'{"version":1,"salt":"xx"}',
     b'{"version":1,"salt":"' + b"00" * 32 + b'","keys":[{"id":"a","digest":"0","tenant":"t"}]}'],
)  # fmt: skip
def test_a_file_that_is_wrong(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(UsageError, match="keys"):
        Scene(tmp_path / "keys")
    with pytest.raises(UsageError, match="keys"):
        revoke(tmp_path / "keys", "a")


def test_what_a_key_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tenant's name"):
        create(tmp_path / "keys", "A b", 0.0)
    with pytest.raises(UsageError, match="at least 1"):
        create(tmp_path / "keys", "a", 0.0, limits={"tokens_per_minute": 0.5})
    with pytest.raises(UsageError, match="can't be written"):
        create(tmp_path / "none" / "keys", "a", 0.0)
    assert not (tmp_path / "keys").exists()


def test_a_key_is_found_by_its_id_while_it_is_good(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key, text = create(file, "acme", 0.0, expires=2000.0)
    scene = Scene(file)
    assert scene.keys.by_id(key.id) is scene.keys.find(text) is not None
    assert scene.keys.by_id("other") is None
    scene.now = 2000.0
    assert scene.keys.by_id(key.id) is None
