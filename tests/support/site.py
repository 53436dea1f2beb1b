"""What somebody does at a real cluster with Helios in it: apply, look, ask, delete."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from helios.launch.tiny_model import tiny_llama

Manifest = dict[str, Any]
GROUP: Final = "helios.dev"
VERSION: Final = "v1alpha1"
MADE: Final = (
    "apis/apps/v1/deployments", "apis/apps/v1/replicasets", "api/v1/pods", "api/v1/services",
    "apis/discovery.k8s.io/v1/endpointslices", "apis/policy/v1/poddisruptionbudgets",
    "apis/autoscaling/v2/horizontalpodautoscalers", "apis/networking.k8s.io/v1/networkpolicies",
    "api/v1/persistentvolumeclaims", "apis/helios.dev/v1alpha1/models", "apis/helios.dev/v1alpha1/inferenceservices",
)  # fmt: skip
"""Kinds of what the operator makes, or others make of it."""
WORKER: Final = {"accelerator": {"count": 0}, "cpu": "50m", "memory": "5Gi"}
ENGINE: Final = {
    "args": ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "67108864"]
}
MINUTES: Final = 60.0


class Site:
    def __init__(
        self, namespace: str, chart: str, kubeconfig: Path, router: str, registry: str, token: str, root: Path
    ) -> None:
        self.namespace, self.chart, self.router, self.root = namespace, chart, router, root
        self._environment = {
            **os.environ, "HELIOS_HOME": str(root / "home"), "HELIOS_REGISTRY__URLS": registry, "HELIOS_TOKEN": token,
        }  # fmt: skip
        self._run = secrets.token_hex(4)
        self.api = config.new_client_from_config(str(kubeconfig))
        self.core, self.own = client.CoreV1Api(self.api), client.CustomObjectsApi(self.api)

    # --- the registry -------------------------------------------------------------------------------------------------

    def repo(self, name: str) -> str:
        """A repository that no other run has."""
        return f"site/{name}-{self._run}"

    def push(self, repo: str, seed: int = 0, *, broken: bool = False) -> str:
        """A tiny Llama as the repository's branch main; ``broken``: vLLM can't read it. Returns the commit."""
        model = tiny_llama(self.root / "models", seed)
        if broken:
            (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "unheard-of"}')
        helios = Path(sys.executable).parent / "helios"
        done = subprocess.run(
            [helios, "push", str(model), repo], env=self._environment, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1].rpartition("@")[2]

    # --- the cluster --------------------------------------------------------------------------------------------------

    def apply(self, kind: str, name: str, spec: Manifest) -> None:
        """Create it, or replace its spec."""
        plural = f"{kind.lower()}s"
        one = {"apiVersion": f"{GROUP}/{VERSION}", "kind": kind, "metadata": {"name": name}, "spec": spec}
        where = (GROUP, VERSION, self.namespace, plural)
        try:
            seen = self.own.get_namespaced_custom_object(*where, name)
        except ApiException as error:
            if error.status != 404:
                raise
            self.own.create_namespaced_custom_object(*where, one, field_validation="Strict")
        else:
            one["metadata"] = {"name": name, "resourceVersion": seen["metadata"]["resourceVersion"]}
            self.own.replace_namespaced_custom_object(*where, name, one, field_validation="Strict")

    def model(self, name: str, repo: str, **spec: Any) -> None:
        self.apply("Model", name, {"source": {"repo": repo}, **spec})

    def service(self, name: str, model: str, **spec: Any) -> None:
        its = {"aggregated": WORKER, "engine": ENGINE, **spec}
        self.apply("InferenceService", name, {"model": {"name": model}, "servedName": name, **its})

    def delete(self, kind: str, name: str) -> None:
        self.own.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, f"{kind.lower()}s", name)

    def status(self, kind: str, name: str) -> Manifest:
        found = self.own.get_namespaced_custom_object(GROUP, VERSION, self.namespace, f"{kind.lower()}s", name)
        status: Manifest = found.get("status") or {}
        return status

    def condition(self, kind: str, name: str, which: str = "Ready") -> tuple[str, str]:
        """Its status and reason."""
        found = [one for one in self.status(kind, name).get("conditions") or () if one["type"] == which]
        return (found[0]["status"], found[0]["reason"]) if found else ("", "")

    def ready(self, name: str) -> tuple[str, str]:
        return self.condition("InferenceService", name)

    def table(self, plural: str) -> list[dict[str, Any]]:
        """What `kubectl get` prints of them."""
        answer = self._get(f"apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{plural}", table=True)
        names = [column["name"] for column in answer["columnDefinitions"]]
        return [dict(zip(names, row["cells"], strict=True)) for row in answer["rows"]]

    def listed(self, path: str) -> list[Manifest]:
        group, _, plural = path.rpartition("/")
        items: list[Manifest] = self._get(f"{group}/namespaces/{self.namespace}/{plural}")["items"]
        return items

    def pods(self, service: str) -> list[Manifest]:
        """Its workers that are not being deleted."""
        return [
            one for one in self.listed("api/v1/pods")
            if one["metadata"]["labels"].get("app.kubernetes.io/instance") == service
            and "deletionTimestamp" not in one["metadata"]
        ]  # fmt: skip

    def kill_operators(self) -> None:
        """All processes of it, without a word."""
        component = "app.kubernetes.io/component=operator"
        self.core.delete_collection_namespaced_pod(self.chart, label_selector=component, grace_period_seconds=0)

    def left(self) -> list[str]:
        """All that is in the namespace but what a new one has, and volumes of its claims."""
        found = [f"{path}/{one['metadata']['name']}" for path in MADE for one in self.listed(path)]
        volumes = self._get("api/v1/persistentvolumes")["items"]
        mine = [one for one in volumes if (one["spec"].get("claimRef") or {}).get("namespace") == self.namespace]
        return found + [f"persistentvolumes/{one['metadata']['name']}" for one in mine]

    def clear(self) -> None:
        """Delete what people have made, and see that all goes."""
        for kind in ("InferenceService", "Model"):
            plural = f"{kind.lower()}s"
            for one in self.listed(f"apis/{GROUP}/{VERSION}/{plural}"):
                self.delete(kind, one["metadata"]["name"])
        until(self.left, [], 5 * MINUTES)

    def _get(self, path: str, *, table: bool = False) -> Any:
        accept = "application/json;as=Table;v=v1;g=meta.k8s.io" if table else "application/json"
        answer = self.api.call_api(
            f"/{path}", "GET", header_params={"Accept": accept}, auth_settings=["BearerToken"], _preload_content=False,
            _return_http_data_only=True,
        )  # fmt: skip
        return json.loads(answer.data)

    # --- requests -----------------------------------------------------------------------------------------------------

    def router_counts(self, metric: str, **labels: str) -> float:
        """A counter of the router; 0 where it has none with these labels."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in httpx.get(f"{self.router}/metrics", timeout=10).text.splitlines():
            name, _, rest = line.partition("{")
            said, _, value = rest.rpartition("} ")
            if name == metric and wanted <= set(said.split(",")):
                return float(value)
        return 0.0

    def ask(self, model: str, tokens: int = 4, seconds: float = 10 * MINUTES, prompt: str = "hello") -> httpx.Response:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        return httpx.post(f"{self.router}/v1/chat/completions", json=body, timeout=seconds)

    @contextmanager
    def asked(self, model: str, clients: int = 1, tokens: int = 4, pause_s: float = 0.0) -> Iterator[Counter[int]]:
        """Clients that ask again and again, after a pause; counts answers by status."""
        statuses: Counter[int] = Counter()
        over = threading.Event()

        def run() -> None:
            while not over.wait(pause_s):
                statuses[self.ask(model, tokens).status_code] += 1

        threads = [threading.Thread(target=run, daemon=True) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield statuses
        finally:
            over.set()
            for thread in threads:
                thread.join(10 * MINUTES)


def until(look: Callable[[], Any], wanted: Any = True, seconds: float = 2 * MINUTES) -> None:
    """Wait until it is what is wanted."""
    end, found = time.monotonic() + seconds, None
    while (found := look()) != wanted:
        assert time.monotonic() < end, f"{found} instead of {wanted}"
        time.sleep(0.5)
