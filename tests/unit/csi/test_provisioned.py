"""Volumes are leases: what is read from a registry's list of them."""

from hypothesis import given
from hypothesis import strategies as st

from csi import attributes, provisioned
from csi.provisioned import LEASE_S, RENEW_S, Made
from helios.registry_answers import Lease

COMMIT = "1" * 40


def made(name="pvc", *, cluster="default", expires=0.0, **asked):
    wanted = attributes.read({"model": "org/name"} | asked, where="x")
    volume, digest = provisioned.volume_id(name), provisioned.digest(wanted)
    return Made(cluster, volume, 10, digest, str(wanted.repo), COMMIT, expires)


def lease(volume, prefix=""):
    return Lease(prefix + volume.holder, volume.repo, volume.commit, volume.expires)


@given(st.text(min_size=1, max_size=128), st.integers(0, (1 << 63) - 1))
def test_a_volume_is_read_back_from_its_lease_whatever_its_name(name, capacity):
    volume = provisioned.volume_id(name)
    assert attributes.check_volume_id(volume) == volume
    one = Made("c" * 63, volume, capacity, "0" * 32, "models/org/name", COMMIT, 5.0)
    assert len(one.holder) <= 200
    assert provisioned.read([lease(one), lease(one, "t/acme/")], "c" * 63) == [one, one]


def test_leases_of_others_are_no_volumes():
    ours = made()
    others = ["node-1", "", "csi/1/default/x/1/y", "csi/2" + ours.holder[5:], ours.holder + "/x", "x/" + ours.holder]
    leases = [lease(ours), lease(made(cluster="west")), *(Lease(h, "models/org/name", COMMIT, 1.0) for h in others)]
    assert provisioned.read(leases, "default") == [ours]


def test_what_was_asked_for_tells_volumes_apart():
    found = {
        made(**asked).asked
        for asked in (
            {}, {"revision": "v1"}, {"format": "hub"}, {"prefetch": "true"}, {"prefetch": "*.json"}, {"commit": COMMIT},
        )
    }  # fmt: skip
    assert len(found) == 6
    assert made(revision="main").asked == made().asked
    assert made("a").id != made("b").id


def test_leases_are_renewed_long_before_they_end():
    now = 1e9
    fresh, old = made("a", expires=now + LEASE_S - RENEW_S / 2), made("b", expires=now + LEASE_S - 1.1 * RENEW_S)
    assert provisioned.due([fresh, old], now) == [old]
