"""The OpenAPI document says what the registry answers, and schemathesis finds nothing that breaks it.

``HELIOS_FUZZ_EXAMPLES`` is how many cases each call gets, ``HELIOS_FUZZ_PHASES`` what schemathesis does (``make soak``
gives more, and has it follow from answers to further calls).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from registry.api.openapi.document import misread
from tests.support.command import Command
from tests.support.hub_site import Site, write
from tests.support.registry import running_registry
from tests.support.upstream import Upstream

pytestmark = pytest.mark.both_databases

EXAMPLES = os.environ.get("HELIOS_FUZZ_EXAMPLES", "5")
PHASES = os.environ.get("HELIOS_FUZZ_PHASES", "examples,coverage,fuzzing")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

CALLS = [] if "stateful" in PHASES else ["--include-tag", "hub", "--include-path-regex", "where|pull|mirror"]
"""In `make test` those of a tenant's part that may ask the upstream."""

HEADER = {"key": "header", "value": {"summary": "s"}}
OPERATIONS = [
    {"key": "file", "value": {"path": "new", "content": "AA==", "encoding": "base64"}},
    {"key": "lfsFile", "value": {"path": "new", "oid": "0" * 64, "size": 2**64}},
    {"key": "deletedFile", "value": {"path": "nowhere"}},
    {"key": "copyFile", "value": {"path": "b", "srcPath": "config.json", "srcRevision": "v1"}},
]
COMMITS = ["\n".join(map(json.dumps, [HEADER, operation])) for operation in OPERATIONS]


FILES = {"README.md": b"---\nlicense: mit\n---\n", "a/b.bin": os.urandom(300_000)}


@contextlib.contextmanager
def registry_of(root: Path, database: Mapping[str, str], **settings: str) -> Iterator[Site]:
    """Two repositories, one of them with history."""
    settings = {"XET_MIN_GIB": "0.0001", **settings}
    helios = Command(root / "home", **{f"HELIOS_REGISTRY__{k}": v for k, v in settings.items()}, **database)
    helios.env["HELIOS_LOG__FORMAT"] = "json"
    with running_registry(helios) as registry:
        files = write(root / "m", FILES)
        helios("push", str(files), "org/name@v1")
        (files / "config.json").write_text("{}")
        commit = helios("push", str(files), "org/name")
        helios("push", str(files), "org/name", "--kind", "datasets")
        yield Site(registry, {}, "", commit, root, helios)


@pytest.fixture(scope="module")
def site(tmp_path_factory, databases):
    """One that asks no upstream."""
    settings = {"OFFLINE": "true", "MIRROR": "off", "UPSTREAM": "http://127.0.0.1:9"}
    with registry_of(tmp_path_factory.mktemp("openapi"), databases(), **settings) as found:
        yield found


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, databases):
    """A tenant's part of one that has a Hub behind it; ``up/name`` is there alone, another one is gated."""
    tenants = json.dumps({"acme": {"owns": ["org/*"]}})
    rules = json.dumps([{"repo": "up/*", "ttl_s": 0.1}])
    with Upstream() as hub:
        for kind in ("models", "datasets"):
            hub.commit("up/name", {**FILES, "config.json": b"{}"}, ref="v1", kind=kind)
            hub.commit("up/name", {**FILES, "config.json": b'{"a": 1}'}, kind=kind)
        hub.commit("up/gated", FILES)
        hub.repos["models/up/gated"].gated = "hf_right"
        settings = {"MIRROR": "on", "UPSTREAM": hub.url, "TENANTS": tenants, "MIRROR_RULES": rules}
        with registry_of(tmp_path_factory.mktemp("mirror"), databases(), **settings) as found:
            yield found, hub


def document(site: Site) -> dict:
    return site.json("/openapi.json")


@pytest.mark.one_database
def test_every_call_is_described_and_every_description_is_of_a_call(site):
    found = document(site)
    assert found["openapi"] == "3.1.0"
    assert found.get("x-helios-undocumented", []) == []
    assert found.get("x-helios-missing", []) == []
    assert misread() == []


@pytest.mark.one_database
def test_references_lead_somewhere(site):
    text = json.dumps(found := document(site))
    names = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= found["components"]["schemas"].keys()
    assert len({op["operationId"] for path in found["paths"].values() for op in path.values()}) > 60


def knowing(site: Site, names: Sequence[str], commits: Sequence[str], below: str = "") -> dict:
    """The document with names that there are beside those that there could be, so that calls get somewhere."""
    found = document(site)
    manifest = site.json(f"{below}/api/v1/content?repo=models/org/name&commit={site.main}")
    placement = manifest["blobs"][0]["placement"]
    real = {
        "RepoName": [f"{kind}/{name}" for name in names for kind in ("models", "datasets")],
        "CommitId": commits,
        "RevisionName": ["main", "v1", *commits],
        "RefName": ["main", "v1"],
        "Sha256": [placement["blob"]],
        "Path": ["config.json", "a/b.bin", "a", "README.md"],
        "Part": sorted({part for name in names for part in name.split("/")}),
        "Key": [placement["objects"][0]["key"]],
    }
    schemas = found["components"]["schemas"]
    schemas["Elsewhere"] = schemas["RepoName"]  # what removes or retires, does it to others
    schemas["PutNotice"]["properties"]["repo"] = {"$ref": "#/components/schemas/Elsewhere"}
    for path in found["paths"].values():
        for parameter in path.get("delete", {}).get("parameters", []):
            if parameter["name"] in ("repo", "org"):
                parameter["schema"] = {"$ref": "#/components/schemas/Elsewhere"}
    # Media that schemathesis can't make are sent under another name; the registry does not look at it.
    load = found["paths"]["/api/v1/bundles"]["post"]["requestBody"]["content"]
    load["application/octet-stream"] = load.pop("application/x-tar")
    commit = found["paths"]["/api/{kind}/{org}/{name}/commit/{revision}"]["post"]["requestBody"]["content"]
    del commit["application/x-ndjson"]
    commit["text/plain"] = {"schema": {"anyOf": [{"enum": COMMITS}, {"type": "string"}]}}
    for name, values in real.items():
        schemas[name] = {"anyOf": [{"enum": values}, schemas[name]]}
    return found


def fuzz(site: Site, document: dict, *more: str, below: str = "") -> None:
    """Run schemathesis; every failure that it finds, and every error in the registry's log, fails the test."""
    where = site.tiny / "openapi.json"
    where.write_text(json.dumps(document))
    command = [
        Path(sys.executable).parent / "schemathesis", "run", where, "--url", site.url + below, "--checks", CHECKS,
        "--phases", PHASES, "--max-examples", EXAMPLES, "--seed", "1",
        "--generation-deterministic", "--request-timeout", "20",
        "--suppress-health-check", "all", "--warnings", "off", "--no-color", "--continue-on-failure", *more,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=site.tiny, capture_output=True, text=True, timeout=7000, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert site.registry.problems() == []
    assert site.ask("GET", "/readyz")[0] == 200


def test_schemathesis_finds_nothing(site):
    fuzz(site, knowing(site, ["org/name"], [site.main]))


@pytest.mark.one_database
def test_schemathesis_finds_nothing_in_a_tenants_part_with_an_upstream_behind(mirror):
    """The upstream works, so that it does not answer (504) is no excuse either."""
    site, hub = mirror
    commits = [site.main, hub.repos["models/up/name"].refs["main"]]
    below = "/t/acme"
    fuzz(site, knowing(site, ["up/name", "up/gated", "org/name"], commits, below), *CALLS, below=below)
    assert hub.seen, "it was asked"
