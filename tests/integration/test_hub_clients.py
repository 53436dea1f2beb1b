"""huggingface_hub of three majors, their command line and transformers read from a real registry.

One matrix: every case of tests/support/hub_read_cases.py, by every version, at the root and under a tenant's prefix,
and once more against a registry that holds nothing and has the first one as its upstream.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

from tests.support.hub_clients import ROOT, VERSIONS
from tests.support.hub_matrix import cases, run_cases
from tests.support.hub_site import expected_tree, hub_site, write
from tests.support.mirror_site import mirror

CASES = "hub_read_cases.py"
TENANTS = {"acme": {"owns": ["acme/*"]}}
ADMIN = "hls_" + secrets.token_hex(16)


@pytest.fixture(scope="module")
def site(tmp_path_factory, databases):
    root = tmp_path_factory.mktemp("hub-clients")
    settings = {"HELIOS_REGISTRY__ADMIN_TOKENS": _admins(root), "HELIOS_REGISTRY__TENANTS": json.dumps(TENANTS)}
    settings |= databases()
    with hub_site(root, **settings) as found:
        many = {f"d{n % 3}/{n:04}": b"" for n in range(1200)}
        found.helios("push", str(write(root / "many", many)), "org/many")
        found.helios("push", str(root / "v1"), "org/m@refs/pr/1", "-m", "The first\n\nwith more to say")
        for name, said, more in (("old/m", "slow", ()), ("old/gone", "it leaks", ("--retire",))):
            found.helios("push", str(write(root / name, {"config.json": b"{}"})), name)
            found.helios("deprecate", name, "-m", said, "--use", "org/m", *more)
        yield found


def _admins(root: Path) -> str:
    path = root / "admins"
    path.write_text(f"{hashlib.sha256(ADMIN.encode()).hexdigest()} the admin\n")
    return str(path)


@pytest.fixture(scope="module")
def report(site, tmp_path_factory, databases):
    """Runs a version against the root or a tenant, once; then tells how a case went."""
    tree = expected_tree(site.files)
    facts = {
        "main": site.main,
        "v1": site.v1,
        "sums": {path: hashlib.sha256(data).hexdigest() for path, data in site.files.items()},
        "sizes": {path: len(data) for path, data in site.files.items()},
        "tree": {p: [e["size"], e["oid"], e.get("lfs", {}).get("oid")] for p, e in tree.items()},
        "etags": {p: e["lfs"]["oid"] if "lfs" in e else e["oid"] for p, e in tree.items()},
        "shards": len(list(site.tiny.glob("*.safetensors"))),
        "token": ADMIN,
    }

    @cache
    def run(version: str, where: str) -> dict[str, str | None]:
        home = tmp_path_factory.mktemp("hub") / "home"
        told = {**facts, "tenant": None if where in ("root", "mirror") else where, "mirror": where == "mirror"}
        if where == "mirror":
            settings = {"HELIOS_REGISTRY__ADMIN_TOKENS": _admins(home.parent), **databases()}
            with mirror(home.parent / "mirror", site.url, **settings) as (_, registry):
                return run_cases(version, CASES, {**told, "endpoint": registry.url}, home)
        return run_cases(
            version, CASES, {**told, "endpoint": site.url + ("" if where == "root" else f"/t/{where}")}, home
        )

    return run


@pytest.mark.parametrize("where", ["root", "acme", "mirror"])
@pytest.mark.parametrize(("case", "version"), [(case, v) for v in VERSIONS[:-1] for case in cases(CASES, v)])
def test_a_user_of_an_older_version(report, case, version, where):
    problem = report(version, where)[case]
    assert problem is None, problem


@pytest.mark.both_databases
@pytest.mark.parametrize("where", ["root", "acme", "mirror"])
@pytest.mark.parametrize("case", cases(CASES, VERSIONS[-1]))
def test_a_user_of_the_newest_version(report, case, where):
    problem = report(VERSIONS[-1], where)[case]
    assert problem is None, problem


TRANSFORMERS = {
    "5 with hub 2": sys.executable,
    "5 with hub 1": ROOT / ".venvs/transformers-hub-1.33.0/bin/python",
    "4 with hub 0": ROOT / ".venvs/transformers-4.57.6/bin/python",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("versions", "where"),
    [
        ("5 with hub 2", "acme"),
        ("4 with hub 0", "acme"),
        ("5 with hub 1", "root"),
        ("5 with hub 2", "mirror"),
    ],
)
def test_transformers_loads_a_model_and_pushes_one(site, tmp_path, versions, where):
    """The newest one with huggingface_hub 2 and 1, and the last one that used 0; through a mirror that is empty one
    can only load."""
    python = Path(TRANSFORMERS[versions])
    assert python.exists(), "run scripts/hub_venvs.py"
    if where == "mirror":
        with mirror(tmp_path / "mirror", site.url) as (_, registry):
            _transformers(python, registry.url, tmp_path, "org/tiny", str(site.tiny), "", versions)
    else:
        endpoint, owner = (site.url, "me") if where == "root" else (f"{site.url}/t/{where}", where)
        name = f"{owner}/pushed-{versions[0]}-{versions[-1]}"
        _transformers(python, endpoint, tmp_path, "org/tiny", str(site.tiny), name, versions)


def _transformers(python: Path, endpoint: str, home: Path, *arguments: str) -> None:
    """Load a model from the registry and from a directory, push it under a name, unless that is empty, and load it."""
    script = """
        import sys, torch
        import huggingface_hub, transformers
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        *sources, pushed, versions = sys.argv[1:]
        majors = [module.__version__.partition(".")[0] for module in (transformers, huggingface_hub)]
        assert " with hub ".join(majors) == versions, majors
        answers = []
        for source in sources:
            assert AutoConfig.from_pretrained(source).num_hidden_layers == 2
            inputs = AutoTokenizer.from_pretrained(source)("the quick river", return_tensors="pt")
            answers.append(AutoModelForCausalLM.from_pretrained(source)(**inputs).logits)
        if pushed:
            model = AutoModelForCausalLM.from_pretrained(sources[1])
            tokenizer = AutoTokenizer.from_pretrained(sources[1])
            model.push_to_hub(pushed)
            tokenizer.push_to_hub(pushed)
            inputs = AutoTokenizer.from_pretrained(pushed)("the quick river", return_tensors="pt")
            answers.append(AutoModelForCausalLM.from_pretrained(pushed)(**inputs).logits)
        assert all(torch.equal(answers[0], other) for other in answers[1:]), answers
        print("equal", answers[0].shape)
    """
    done = subprocess.run(
        [python, "-c", textwrap.dedent(script), *arguments],
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal")
