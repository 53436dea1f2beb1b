"""A real cluster with the chart in it (docs/kubernetes.md, "Tried in a cluster"): `make test-site`.

Nothing else collects this directory. What it is told, by the environment:

- ``KUBECONFIG``: an administrator of the cluster. What is tested is made in the namespace ``HELIOS_SITE_NAMESPACE``
  (models), where the chart's router looks for workers, and nothing else may be in it. The chart's own is
  ``HELIOS_SITE_CHART`` (helios);
- ``HELIOS_SITE_ROUTER``, ``HELIOS_SITE_REGISTRY``: addresses of the two from here;
- ``HELIOS_SITE_TOKEN``: a token of the registry's administrators.

Workers run on CPUs, with the image that the operator has for them; 16 GiB of memory are needed on the nodes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.site import Site

TOLD = dict(os.environ)
"""What was said to the run; tests have no HELIOS_ variables."""


def told(name: str, default: str | None = None) -> str:
    found = TOLD.get(name, default)
    if found is None:
        pytest.fail(f"{name} is not set; tests/site/conftest.py says what is needed")
    return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one = Site(
        told("HELIOS_SITE_NAMESPACE", "models"), told("HELIOS_SITE_CHART", "helios"), Path(told("KUBECONFIG")),
        told("HELIOS_SITE_ROUTER"), told("HELIOS_SITE_REGISTRY"), told("HELIOS_SITE_TOKEN"), tmp_path,
    )  # fmt: skip
    assert one.left() == [], "something is in the namespace"
    yield one
    one.clear()
