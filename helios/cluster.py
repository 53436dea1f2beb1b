"""How a process reaches its Kubernetes cluster: the official client's asyncio half, which an extra brings.

Importing the client takes seconds and some 110 MB, so it is imported where it is used, and whoever imports this module
does not pay for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from helios.errors import UsageError

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient

NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
READ_BUFFER: Final = 1 << 21
"""Bytes of an answer that are read ahead, as the client has it: events may have 1.5 MiB."""


def require_client(what: str) -> None:
    """Raise UsageError where the client is not installed; ``what`` begins the sentence."""
    spec = find_spec("kubernetes")
    if spec is None or not any(Path(place, "aio").is_dir() for place in spec.submodule_search_locations or ()):
        raise UsageError(f"{what} the official client", hint="Install it: pip install 'helios-llm[kubernetes]'.")


@asynccontextmanager
async def cluster_client(
    *, kubeconfig: str = "", context: str = "", namespace: str = ""
) -> AsyncIterator[tuple[ApiClient, str]]:
    """A client with credentials as they are now, and the namespace that is meant.

    ``kubeconfig``: a file; empty: the pod's service account, or else what KUBECONFIG or ~/.kube/config says, of which
    ``context`` is used, the current one where that is empty. Raises UsageError for what can't be read.
    """
    from kubernetes.aio import config
    from kubernetes.aio.client import ApiClient, Configuration

    configuration = Configuration()
    try:
        if not kubeconfig and NAMESPACE_FILE.exists():
            config.load_incluster_config(client_configuration=configuration)
            namespace = namespace or NAMESPACE_FILE.read_text().strip()
        else:
            file, wanted = kubeconfig or None, context or None
            await config.load_kube_config(file, wanted, client_configuration=configuration, persist_config=False)
            if not namespace:
                contexts, current = config.list_kube_config_contexts(file)
                chosen = current if wanted is None else next(c for c in contexts if c["name"] == wanted)
                namespace = chosen["context"].get("namespace", "")
    except (config.ConfigException, OSError) as error:
        raise UsageError(f"the cluster's address and credentials can't be read: {error}") from None
    async with ApiClient(configuration) as client:
        _lighten(client)
        yield client, namespace or "default"


def _lighten(client: ApiClient) -> None:
    """Its session looks into the environment and into ~/.netrc anew for each request, in two threads one after the
    other: as much of a CPU as the rest of a request. It may where a proxy is set."""
    from urllib.request import getproxies

    import aiohttp

    if not getproxies():
        session = client.rest_client.pool_manager
        connector = session.connector
        session.detach()
        client.rest_client.pool_manager = aiohttp.ClientSession(connector=connector, read_bufsize=READ_BUFFER)
