"""Where a registry may send its clients: not into their own machine, nor to what hands out credentials."""

from __future__ import annotations

import socket

import pytest

from helios.errors import Unavailable
from helios.http.client import HttpClient
from helios.http.places import sent_by

NEVER = ["169.254.169.254", "169.254.0.1", "fe80::1%eth0", "::ffff:169.254.169.254", "fd00:ec2::254", "100.100.100.200",
         "168.63.129.16", "224.0.0.1", "ff02::1"]  # fmt: skip
HERE = ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"]
ELSEWHERE = ["10.1.2.3", "192.168.0.7", "52.216.1.1", "2600:1f18::1", "fd12::1"]


@pytest.mark.parametrize("base", ["http://10.0.0.5:8470", "http://192.0.2.1/t/acme", "http://no-such-host.invalid"])
def test_a_registry_elsewhere_sends_nobody_into_his_own_machine(base):
    admits = sent_by(base)
    assert [address for address in NEVER + HERE if admits(address)] == []
    assert all(map(admits, ELSEWHERE))


@pytest.mark.parametrize(
    "base", ["unix:/run/x.sock", "http://127.0.0.1:8470", "http://[::1]:8470", "http://localhost/t/a"]
)
def test_one_on_this_machine_may(base):
    admits = sent_by(base)
    assert all(map(admits, HERE + ELSEWHERE))
    assert [address for address in NEVER if admits(address)] == []


def test_nothing_is_sent_where_it_may_not_lead():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = HttpClient(f"http://127.0.0.1:{server.getsockname()[1]}", admits=lambda address: False)
        client.warm(2)
        assert client.idle == 0
        with pytest.raises(Unavailable, match="no place that a registry may send"):
            client.bytes("GET", "/secret")
        client.close()
        server.settimeout(5)
        for _ in range(3):
            connection, _ = server.accept()
            connection.settimeout(5)
            assert connection.recv(100) == b""
            connection.close()
