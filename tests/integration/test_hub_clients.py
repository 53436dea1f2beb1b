"""huggingface_hub of three majors, their command line and transformers read from a real registry.

One matrix: every case of tests/support/hub_read_cases.py, by every version, at the root and under a tenant's prefix.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from functools import cache

import pytest

from tests.support.hub_clients import VERSIONS
from tests.support.hub_matrix import cases, run_cases
from tests.support.hub_site import expected_tree, hub_site, write

CASES = "hub_read_cases.py"
TENANTS = {"acme": {"owns": ["acme/*"]}}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub-clients")
    with hub_site(root, HELIOS_REGISTRY__TENANTS=json.dumps(TENANTS)) as found:
        many = {f"d{n % 3}/{n:04}": b"" for n in range(1200)}
        found.helios("push", str(write(root / "many", many)), "org/many")
        found.helios("push", str(root / "v1"), "org/m@refs/pr/1", "-m", "The first\n\nwith more to say")
        yield found


@pytest.fixture(scope="module")
def report(site, tmp_path_factory):
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
    }

    @cache
    def run(version: str, tenant: str | None) -> dict[str, str | None]:
        endpoint = site.url if tenant is None else f"{site.url}/t/{tenant}"
        home = tmp_path_factory.mktemp("hub") / "home"
        return run_cases(version, CASES, {**facts, "endpoint": endpoint, "tenant": tenant}, home)

    return run


@pytest.mark.parametrize("tenant", [None, "acme"], ids=["root", "acme"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", cases(CASES))
def test_a_user_of_the_hub(report, case, version, tenant):
    problem = report(version, tenant)[case]
    assert problem is None, problem


@pytest.mark.slow
def test_transformers_loads_a_model_and_pushes_one(site, tmp_path):
    script = """
        import sys, torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        answers = []
        for source in sys.argv[1:]:
            assert AutoConfig.from_pretrained(source).num_hidden_layers == 2
            inputs = AutoTokenizer.from_pretrained(source)("the quick river", return_tensors="pt")
            answers.append(AutoModelForCausalLM.from_pretrained(source)(**inputs).logits)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[2])
        model.push_to_hub("acme/pushed")
        tokenizer.push_to_hub("acme/pushed")
        inputs = AutoTokenizer.from_pretrained("acme/pushed")("the quick river", return_tensors="pt")
        answers.append(AutoModelForCausalLM.from_pretrained("acme/pushed")(**inputs).logits)
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2]), answers
        print("equal", answers[0].shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), "org/tiny", str(site.tiny)],
        env={
            **os.environ,
            "HF_ENDPOINT": f"{site.url}/t/acme",
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal")
