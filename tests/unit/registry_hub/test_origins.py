"""Where an upstream may send us."""

import base64
import http.server
import threading

import pytest

from helios.errors import HeliosError, IntegrityError
from helios.http.client import HttpClient
from registry.pull.origins import Origins, target_of

HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("here", "location", "leads_to"),
    [
        (HUB, "/other?x=1", "https://huggingface.co/other?x=1"),
        (HUB, "https://cdn-lfs.hf.co/a/b?sig=c", "https://cdn-lfs.hf.co/a/b?sig=c"),
        (HUB, "https://CDN.huggingface.co:8443/a", "https://cdn.huggingface.co:8443/a"),
        ("http://10.0.0.1:80", "http://10.0.0.1:9000/a", "http://10.0.0.1:9000/a"),
        ("http://hub.example", "https://eu.store.example/a", "https://eu.store.example/a"),
    ],
)
def test_redirects_that_are_followed(here, location, leads_to):
    origins = Origins(here, ["*.store.example"], timeout_s=1)
    assert origins.follow(origins.home, location).url == leads_to


@pytest.mark.parametrize(
    ("here", "location", "says"),
    [
        (HUB, "http://huggingface.co/x", "from https to http"),
        (HUB, "https://evil.example/x", "not allowed"),
        (HUB, "https://huggingface.co.evil.example/x", "not allowed"),
        (HUB, "https://evilhf.co/x", "not allowed"),
        (HUB, "https://user:pass@hf.co/x", "without credentials"),
        (HUB, "file:///etc/passwd", "http or https"),
        (HUB, "https://hf.co:x/", "no URL"),
        (HUB, "https://hf.co/a b", "malformed"),
        (HUB, "http://[::1/", "no URL"),
        (HUB, "//[x]/", "no URL"),
        (HUB, "https://\u2100.hf.co/", "no URL"),
        ("http://10.0.0.1", "http://169.254.169.254/latest", "not allowed"),
        ("http://10.0.0.1", None, "never"),
    ],
)
def test_redirects_that_are_not(here, location, says):
    origins = Origins(here, timeout_s=1)
    if location is None:
        assert origins.follow(origins.home, None) == origins.home, "an empty Location leads nowhere else"
        return
    with pytest.raises(IntegrityError) as caught:
        origins.follow(origins.home, location)
    assert says in caught.value.message


def test_a_refused_host_names_the_setting():
    origins = Origins(HUB, timeout_s=1)
    with pytest.raises(IntegrityError) as caught:
        origins.follow(origins.home, "https://s3.example/x")
    assert "'s3.example' to registry.upstream_redirects" in caught.value.hint


@pytest.mark.parametrize("url", ["https://bob:TellNobody@hf.co/x", "https://hf.co/a b?X-Amz-Signature=TellNobody",
                                 "ftp://hf.co/a?sig=TellNobody", "https://hf.co:x/?sig=TellNobody"])  # fmt: skip
def test_errors_tell_neither_credentials_nor_signatures(url):
    """A signed address is a permission for whoever reads the log."""
    with pytest.raises(IntegrityError) as caught:
        target_of(url)
    assert "hf.co" in caught.value.message
    assert "TellNobody" not in caught.value.message


def test_a_token_goes_to_the_very_origin_alone():
    origins = Origins("http://hub.example:8080/prefix", timeout_s=1)
    assert origins.trusted(target_of("http://HUB.example:8080/x").origin)
    for other in ("https://hub.example:8080", "http://hub.example", "http://hub.example:8081"):
        assert not origins.trusted(other)


def test_connections_are_kept_for_a_bounded_number_of_origins():
    origins = Origins(HUB, timeout_s=1)
    first = origins.client("http://127.0.0.1:1")
    assert origins.client("http://127.0.0.1:1") is first
    for port in range(2, 30):
        origins.client(f"http://127.0.0.1:{port}")
    assert origins.client("http://127.0.0.1:1") is not first
    origins.close()


@pytest.fixture
def proxy():
    """An HTTP proxy that notes what it is asked, and answers itself."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.note()
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def do_CONNECT(self):
            self.note()
            self.send_error(403)

        def note(self):
            login = self.headers.get("proxy-authorization")
            seen.append((self.command, self.path, *([login] if login else [])))

        def log_message(self, *args):
            """``seen`` is the log."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()


def test_a_proxy_that_the_environment_names_is_used(proxy, monkeypatch):
    url, seen = proxy
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, url)
    monkeypatch.setenv("no_proxy", "near.example")
    origins = Origins("http://hub.example", timeout_s=5)
    with origins.client("http://hub.example").request("GET", "/a?b") as answer:
        assert answer.read() == b"ok"
    with pytest.raises(Exception, match="can't be reached"):
        origins.client("https://cdn.example:8443").request("GET", "/x")
    assert seen == [("GET", "http://hub.example/a?b"), ("CONNECT", "cdn.example:8443")]
    assert isinstance(origins.client("http://near.example"), HttpClient)
    assert origins.client("http://near.example")._proxy is None
    origins.close()


def test_a_proxy_gets_its_password_and_nobody_else(proxy, monkeypatch):
    """Neither the hosts behind it nor who reads what went wrong."""
    url, seen = proxy
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, url.replace("//", "//bob:Tell%2FNobody@"))
    login = "Basic " + base64.b64encode(b"bob:Tell/Nobody").decode()
    origins = Origins("http://hub.example", timeout_s=5)
    with origins.client("http://hub.example").request("GET", "/a") as answer:
        assert answer.read() == b"ok"
    with pytest.raises(HeliosError, match="can't be reached") as caught:
        origins.client("https://cdn.example").request("GET", "/x")
    assert "Nobody" not in str(caught.value)
    assert login not in str(caught.value)
    assert seen == [("GET", "http://hub.example/a", login), ("CONNECT", "cdn.example:443", login)]
    origins.close()
