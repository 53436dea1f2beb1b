"""The registry as the driver uses it. Everything blocks; threads may share it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, TypeVar

from csi import provisioned
from csi.attributes import Wanted
from csi.pod_tokens import PodToken
from csi.provisioned import LEASE_S, Made
from helios.config import Config
from helios.embedded import AttachedRegistry, attach
from helios.errors import NotFound, Unavailable
from helios.home import Home
from helios.names import RepoId
from helios.registry_answers import Allowed, PodAllowed
from helios.registry_client import RegistryClient

T = TypeVar("T")

ANSWER_S: Final = 15.0
"""Longest wait for one answer, in seconds."""


class Registry:
    """The configured registry, or the home's own; found again when it is needed and the last one does not answer."""

    def __init__(self, config: Config, home: Home) -> None:
        self._config, self._home = config, home
        self._lock = threading.Lock()
        self._attached: tuple[AttachedRegistry, RegistryClient] | None = None

    def resolve(self, wanted: Wanted) -> tuple[str, int]:
        """The commit that is meant, and the bytes of its files. No upstream is asked.

        Raises RepoNotFound, RevisionNotFound, Retired, Forbidden, Unavailable.
        """

        def ask(client: RegistryClient) -> tuple[str, int]:
            commit = client.resolve(wanted.repo, wanted.commit or wanted.revision).commit
            return commit, client.where(wanted.repo, commit).bytes or 0

        return self._ask(ask)

    def allowed(self, repo: RepoId, namespace: str) -> Allowed:
        """Whether pods of the namespace may read the repository. Raises RepoNotFound, Unavailable."""
        return self._ask(lambda client: client.allowed(repo, namespace))

    def pod_allowed(self, repo: RepoId, token: PodToken) -> PodAllowed:
        """Whether the pod whose token it is may read the repository. Raises RepoNotFound, Unauthorized, Unavailable."""
        return self._ask(lambda client: client.pod_allowed(repo, token.reveal()))

    def volumes(self) -> list[Made]:
        """The volumes of this cluster that there are."""
        return self._ask(lambda client: provisioned.read(client.leases(), self._config.csi.cluster))

    def keep(self, made: Made) -> None:
        """Make the volume, or keep it for longer. Raises RepoNotFound or RevisionNotFound when its commit has gone."""
        self._ask(lambda client: client.lease(made.holder, RepoId.from_canonical(made.repo), made.commit, LEASE_S))

    def release(self, made: Made) -> None:
        """Have no such volume."""

        def let_go(client: RegistryClient) -> None:
            try:
                client.lease(made.holder, RepoId.from_canonical(made.repo), made.commit, 0)
            except NotFound:
                return  # the repository has gone, and its leases with it

        self._ask(let_go)

    def close(self) -> None:
        self._detach()

    def _ask(self, question: Callable[[RegistryClient], T]) -> T:
        with self._lock:
            if self._attached is None:
                attached = attach(self._config, self._home)
                self._attached = attached, attached.client(timeout_s=ANSWER_S)
            client = self._attached[1]
        try:
            return question(client)
        except Unavailable:
            self._detach(client)  # the next call looks for one that answers
            raise

    def _detach(self, client: RegistryClient | None = None) -> None:
        with self._lock:
            if self._attached is None or (client is not None and self._attached[1] is not client):
                return
            attached, self._attached = self._attached[0], None
        attached.close()
