"""Which pods may have which model: the registry decides by the pod's namespace."""

import contextlib
import hashlib
import json
import os

import pytest

from csi.pod_tokens import KEY
from csi.rights import NAMESPACE
from helios.errors import InvalidInput, RepoNotFound
from helios.http.client import HttpClient
from helios.names import RepoId
from helios.registry_answers import Allowed
from helios.registry_client import RegistryClient
from tests.support.command import Command
from tests.support.csi import refused, running_driver
from tests.support.mounts import call, mounted, write
from tests.support.pod_tokens import ISSUER, Issuer, published
from tests.support.registry import running_registry

FILES = {"config.json": b"{}"}
TENANTS = {
    "acme": {"owns": ["acme/*"], "namespaces": ["acme", "acme-*"]},
    "rival": {"owns": ["rival/*"], "namespaces": ["rival"]},
}
TOKEN = "the-token-of-the-nodes"


@pytest.fixture
def core(tmp_path):
    """A registry's home: acme owns acme/*, nodes have a token."""
    tokens = tmp_path / "node.tokens"
    tokens.write_text(f"{hashlib.sha256(TOKEN.encode()).hexdigest()} nodes\n")
    settings = {"TENANTS": json.dumps(TENANTS), "NODE_TOKENS": str(tokens)}
    return Command(tmp_path / "core", **{f"HELIOS_REGISTRY__{key}": value for key, value in settings.items()})


def test_the_registry_says_which_namespaces_may_read_what(core, tmp_path):
    with running_registry(core) as registry, contextlib.closing(registry.client(registry.socket)) as client:
        core("push", str(write(tmp_path / "m", FILES)), "acme/secret")
        secret = RepoId.parse("acme/secret")
        assert client.allowed(secret, "acme-7") == Allowed(True)
        assert not client.allowed(secret, "rival").allowed
        assert "is of no tenant" in (client.allowed(secret, "default").reason or "")
        with pytest.raises(InvalidInput, match="namespace"):
            client.allowed(secret, "Not/One")
        with contextlib.closing(registry.client()) as anybody, pytest.raises(RepoNotFound):
            anybody.allowed(secret, "acme")


def test_nodes_with_a_tenants_token_learn_of_no_other_tenant_whatever_namespace_they_name(core, tmp_path):
    """A node token may name any namespace; a cluster that isn't trusted so far has its tenant's (docs/csi.md)."""
    tokens = tmp_path / "rival.tokens"
    tokens.write_text(f"{hashlib.sha256(b'rivals').hexdigest()} the rival's nodes\n")
    tenants = {**TENANTS, "rival": {**TENANTS["rival"], "tokens": str(tokens)}}
    core.env["HELIOS_REGISTRY__TENANTS"] = json.dumps(tenants)
    with running_registry(core) as registry:
        for name in ("acme/secret", "rival/own"):
            core("push", str(write(tmp_path / "m", FILES)), name)
        with (
            contextlib.closing(RegistryClient(HttpClient(registry.url, token=lambda: TOKEN))) as node,
            contextlib.closing(RegistryClient(HttpClient(f"{registry.url}/t/rival", token=lambda: "rivals"))) as rivals,
        ):
            assert node.allowed(RepoId.parse("acme/secret"), "acme").allowed
            with pytest.raises(RepoNotFound):
                rivals.allowed(RepoId.parse("acme/secret"), "acme")
            assert rivals.allowed(RepoId.parse("rival/own"), "rival").allowed
            assert not rivals.allowed(RepoId.parse("rival/own"), "acme").allowed


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind-mount")
def test_a_pod_gets_what_its_namespace_may_read_and_nothing_else(core, helios_home, tmp_path):
    with running_registry(core) as registry:
        for name in ("acme/secret", "open/model"):
            core("push", str(write(tmp_path / "m", FILES)), name)
        env = {"HELIOS_REGISTRY__URLS": registry.url, "HELIOS_TOKEN": TOKEN}
        rights = env | {"HELIOS_CSI__AUTHORISE": "namespace"}
        with (
            mounted(helios_home, tmp_path / "mnt", **env) as mount,
            running_driver(helios_home, tmp_path, **rights) as driver,
        ):
            target, other = driver.target("pod"), driver.target("other")
            with refused("FAILED_PRECONDITION", "podInfoOnMount: true"):
                driver.publish("v", target, model="open/model")
            with refused("PERMISSION_DENIED", r"namespace rival may not read acme/secret: .*registry\.tenants"):
                driver.publish("v", target, model="acme/secret", **{NAMESPACE: "rival"})
            with refused("NOT_FOUND", "acme/nothing"):
                driver.publish("v", target, model="acme/nothing", **{NAMESPACE: "acme"})
            assert not target.exists()
            assert call(mount, "GET", "volumes") == {"volumes": []}
            driver.publish("v", target, model="acme/secret", **{NAMESPACE: "acme"})
            assert (target / "config.json").read_bytes() == b"{}"
            with refused("PERMISSION_DENIED", "namespace default"):  # though the volume is there
                driver.publish("v", other, model="acme/secret", **{NAMESPACE: "default"})
            driver.publish("w", other, model="open/model", **{NAMESPACE: "default"})
            driver.unpublish("w", other)
            registry.kill()
            driver.publish("v2", other, model="acme/secret", **{NAMESPACE: "acme"})
            driver.unpublish("v2", other)
            with refused("UNAVAILABLE", "."):
                driver.publish("v3", other, model="acme/secret", timeout=20, **{NAMESPACE: "acme-2"})
            assert not other.exists()
            driver.unpublish("v", target)


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind-mount")
def test_a_pods_token_decides_and_nobody_shows_it(core, helios_home, tmp_path):
    with Issuer("RS256") as issuer:
        clusters = {"prod": {"jwks": issuer.url, "issuer": ISSUER}}
        core.env |= {"HELIOS_REGISTRY__CLUSTERS": json.dumps(clusters), "HELIOS_LOG__LEVEL": "debug"}
        tokens = []

        def token(namespace, **claims):
            tokens.append(issuer.sign(namespace, **claims))
            return {KEY: published(tokens[-1])}

        with running_registry(core) as registry:
            core("push", str(write(tmp_path / "m", FILES)), "acme/secret")
            env = {"HELIOS_REGISTRY__URLS": registry.url, "HELIOS_TOKEN": TOKEN, "HELIOS_LOG__LEVEL": "debug"}
            rights = env | {"HELIOS_CSI__AUTHORISE": "token"}
            with (
                mounted(helios_home, tmp_path / "mnt", **env) as mount,
                running_driver(helios_home, tmp_path, **rights) as driver,
            ):
                target, other = driver.target("pod"), driver.target("other")
                lie = {NAMESPACE: "acme"}
                with refused("FAILED_PRECONDITION", "tokenRequests"):
                    driver.publish("v", target, model="acme/secret", **lie)
                with refused("PERMISSION_DENIED", "another pod's, of the namespace rival"):
                    driver.publish("v", target, model="acme/secret", **lie, **token("rival"))
                with refused("PERMISSION_DENIED", "namespace rival may not read acme/secret"):
                    driver.publish("v", target, model="acme/secret", **token("rival"))
                with refused("UNAUTHENTICATED", "another audience"):
                    driver.publish("v", target, model="acme/secret", **lie, **token("acme", aud=["vault"]))
                stranger = Issuer("RS256")
                tokens.append(stranger.sign("acme"))
                with refused("UNAUTHENTICATED", "signature"):
                    driver.publish("v", target, model="acme/secret", **lie, **{KEY: published(tokens[-1])})
                assert not target.exists()
                assert call(mount, "GET", "volumes") == {"volumes": []}
                driver.publish("v", target, model="acme/secret", **lie, **token("acme"))
                assert (target / "config.json").read_bytes() == b"{}"
                for _ in range(10):  # as requiresRepublish does it, with fresh tokens, and as secrets
                    driver.publish("v", target, model="acme/secret", secrets=token("acme"), **lie)
                registry.kill()
                driver.publish("w", other, model="acme/secret", **lie, **token("acme"))
                driver.unpublish("w", other)
                with refused("UNAVAILABLE", "."):
                    driver.publish("w", other, model="acme/secret", timeout=20, **token("acme"))
                core.env["HELIOS_REGISTRY__TENANTS"] = json.dumps({"acme": {"owns": ["acme/*"]}})
                port = registry.url.rpartition(":")[2]
                with running_registry(core, "--port", port):
                    with refused("PERMISSION_DENIED", "may not read acme/secret.*stays mounted in this pod"):
                        driver.publish("v", target, model="acme/secret", timeout=20, **lie, **token("acme"))
                    assert (target / "config.json").read_bytes() == b"{}"
                    with refused("PERMISSION_DENIED", "may not read acme/secret: "):
                        driver.publish("w", other, model="acme/secret", **lie, **token("acme"))
                driver.unpublish("v", target)
        shown = [path for path in tmp_path.rglob("*.log") if any(each in path.read_text() for each in tokens)]
        assert shown == []
        assert {*tmp_path.rglob("*.log")} >= {driver.log}
        assert "refused" in driver.log.read_text()
