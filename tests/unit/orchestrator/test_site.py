"""The operator's settings of the site: what can't work is refused by name, and what follows from others follows."""

from __future__ import annotations

from typing import Any

import pytest

from helios.config import OperatorSettings, SecretKey, SignalsSettings, SiteSettings
from helios.errors import UsageError
from orchestrator.reconcile.site import site_of


def settings(signals: SignalsSettings | None = None, **site: Any) -> OperatorSettings:
    return OperatorSettings(site=SiteSettings(**site), signals=signals or SignalsSettings())


def test_what_is_served_follows_from_the_signals():
    served = SignalsSettings(external_listen="0.0.0.0:8495", scaler_listen="0.0.0.0:8496")
    assert not site_of(settings(worker_image="a:1")).external_metrics
    found = site_of(settings(served, worker_image="a:1", keda_scaler="operator.helios.svc:8496"))
    assert (found.external_metrics, found.worker_image, found.keda_scaler) == (True, "a:1", "operator.helios.svc:8496")


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"routers": ["router:8481"]}, "operator.site.routers: 'router:8481' is no address"),
        ({"registry_urls": ["http://me:secret@registry"]}, "operator.site.registry_urls"),
        ({"registrar": SecretKey(name="a", key="b")}, "registrar is for operator.site.routers, which is empty"),
        ({"compile_key": SecretKey(name="a", key="b")}, "compile_key is for operator.site.registry_urls"),
        ({"keda_scaler": "operator:8496"}, "keda_scaler needs operator.signals.scaler_listen"),
        ({"keda_authentication": "a"}, "keda_authentication needs operator.site.keda_scaler and"),
    ],
)
def test_what_cannot_work_is_refused(site: dict[str, Any], said: str):
    with pytest.raises(UsageError) as refused:
        site_of(settings(**site))
    assert said in refused.value.message
    assert "secret" not in refused.value.message
