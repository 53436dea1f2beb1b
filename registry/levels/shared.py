"""Fetches of all of a registry's processes: the one that was asked first has a fetch, and the others ask that one.

Which process has it says a row in SQL, as for downloads (registry/pull/sharing.py). Where that process is gone, or has
forgotten it, whoever is asked next begins anew; where it only can't be reached, too: files are downloaded once anyway.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

import msgspec

from helios.decoding import from_json
from helios.errors import HeliosError, Unavailable
from helios.http.client import error_of
from helios.names import RepoId
from helios.registry_answers import Fetch as Told
from registry.levels.fetches import Fetches, told
from registry.metadata.sharing import Owner
from registry.pull.sharing import GRANT_S, Lead, Sharing, unreachable
from registry.xet.tokens import Grant

log = logging.getLogger("helios.registry.levels")

PATH: Final = "/api/v1/fetches"
ASK_S: Final = 3.0
"""Longest wait for another process' word, in seconds."""


class FetchGrant(Grant, frozen=True, array_like=True, tag="fetch"):
    """Another process of this registry may ask for the fetch of a revision."""

    rev: str


class SharedFetches:
    """Of one registry, as one of its processes sees them. Blocking; threads may share it."""

    def __init__(self, fetches: Fetches, sharing: Sharing) -> None:
        self._fetches, self._sharing = fetches, sharing
        self._lock = threading.Lock()
        self._ours: dict[tuple[RepoId, str], Lead] = {}

    def start(self, repo: RepoId, rev: str) -> Told:
        """See ``Fetches.start``; the process that has one is asked to."""
        self._let_go()
        lead = self._lead(repo, rev)
        if lead is None:
            return self.start_here(repo, rev)
        owner = lead.look().owner
        if owner is not None:
            try:
                return self._ask(lead, owner, "POST", repo, rev)
            except HeliosError as error:
                if not unreachable(error) and error.status != 404:
                    raise
                gone = owner.process if error.status == 404 else None
            if gone is None or lead.look(gone).owner is not None:
                return self.start_here(repo, rev)
        try:
            found = self.start_here(repo, rev)
        except HeliosError:
            lead.leave()
            raise
        with self._lock:
            self._ours[repo, rev] = lead
        return found

    def find(self, repo: RepoId, rev: str) -> Told | None:
        """See ``Fetches.find``; of any process."""
        found = self.find_here(repo, rev)
        lead = None if found is not None else self._lead(repo, rev)
        owner = None if lead is None else lead.other()
        if lead is None or owner is None:
            return found
        try:
            return self._ask(lead, owner, "GET", repo, rev)
        except HeliosError as error:  # it has none, is going, or can't be reached: then nobody knows of one
            log.debug("a fetch is not told", extra={"repo": str(repo), "rev": rev, "error": error.message})
            return None

    def start_here(self, repo: RepoId, rev: str) -> Told:
        """Of this process alone."""
        fetch = self._fetches.start(repo, rev)
        return told(fetch, self._fetches.retry_after_s(fetch))

    def find_here(self, repo: RepoId, rev: str) -> Told | None:
        """Of this process alone."""
        fetch = self._fetches.find(repo, rev)
        return None if fetch is None else told(fetch, self._fetches.retry_after_s(fetch))

    def _lead(self, repo: RepoId, rev: str) -> Lead | None:
        return self._sharing.lead(f"fetch {repo} {rev}", self._sharing.catalog.domain_of(repo), lambda: None)

    def _let_go(self) -> None:
        """Give back what nobody remembers any more."""
        with self._lock:
            over = [key for key in self._ours if self._fetches.find(*key) is None]
            leads = [self._ours.pop(key) for key in over]
        for lead in leads:
            lead.leave()

    def _ask(self, lead: Lead, owner: Owner, method: str, repo: RepoId, rev: str) -> Told:
        """What the process that has the fetch says of it. Raises what it answers, and Unavailable."""
        if not owner.url:
            raise Unavailable("the process of the registry that fetches this can't be reached")
        signer = self._sharing.processes.signer
        grant = signer.sign(FetchGrant(str(repo), int(signer.clock()) + GRANT_S, rev))
        client, headers = self._sharing.processes.client(owner.url), {"authorization": f"Bearer {grant}"}
        params = {"repo": str(repo), "rev": rev}
        with client.request(method, PATH, params=params, headers=headers, timeout_s=ASK_S) as answer:
            body = answer.read(1 << 16)
        if answer.status >= 400:
            raise error_of(answer.status, body, f"{owner.url}: {PATH}")
        try:
            return from_json(body, Told)
        except msgspec.DecodeError as error:
            raise Unavailable(f"{owner.url} does not say how far a fetch is: {error}") from None
