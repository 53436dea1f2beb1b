"""Pull-through: what a request of the Hub API asks for and the registry does not hold comes from the upstream.

``prepare`` runs before a request is looked up: it makes sure that the revision is known and that the caller may read
it, asking the upstream where that is needed, once for all who wait for the same. The lookups themselves are local.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from helios.config import RegistrySettings
from helios.errors import GatedRepo, HeliosError, InvalidInput, NotFound, RepoNotFound, RevisionNotFound, Unavailable
from helios.http.server import FilePart
from helios.names import KINDS, RepoId, check_revision, is_commit
from heliosfs.store.placement import PlacedBlob
from registry.catalog import Catalog
from registry.hub.paths import HubCall
from registry.hub.verified import VerifiedReader, Wanted
from registry.metadata.mirror import FollowedRef
from registry.mirror.admitting import Admitting
from registry.mirror.asking import NO_S, Asking, Caller, unavailable
from registry.mirror.brief import Brief
from registry.mirror.completing import Completing
from registry.mirror.policy import Step, rule_for, step_for_ref
from registry.mirror.state import Mirrored, MirrorState
from registry.mirror.stream import landed, parts
from registry.pull.faults import again
from registry.pull.flight import Flight
from registry.pull.setup import Pulling

log = logging.getLogger("helios.registry.mirror")

FOLLOWED: Final = frozenset(
    {"info", "tree", "paths-info", "refs", "commits", "resolve", "xet-read-token", "auth-check", "lfs-files"}
)
"""Calls about one repository."""
ANSWER_S: Final = 8.0
"""Longest wait for the upstream, in seconds: clients give up on a HEAD after 10."""
RENEW_S: Final = 3.0
"""Longest wait for news of a ref that is known already; then it is served as it is."""
THREADS: Final = 16
"""Questions to the upstream at a time."""
DEFAULT_REVISION: Final = "main"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a reading of a request needs."""

    repo: RepoId
    revision: str
    step: Step
    followed: bool


class Mirror:
    """One registry's view of its upstream; close it at shutdown."""

    def __init__(self, settings: RegistrySettings, catalog: Catalog, pulling: Pulling) -> None:
        self._on, self._offline = settings.mirror == "on", pulling.upstream.offline
        self._rules = settings.mirror_rules
        self._catalog, self._client, self._flights = catalog, pulling.upstream, pulling.flights
        self.state = MirrorState(catalog)
        self._completing = Completing(catalog, self.state, pulling.pulls, whole=settings.mirror_complete)
        pulling.flights.listen(self._completing.stored)
        self._asking = Asking(self._client, self.state, self._rules, catalog.admission, self._completing.learnt)
        self._admitting = Admitting(catalog)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="mirror")
        self._lock = threading.Lock()
        self._shared: dict[tuple[str, ...], Future[None]] = {}
        self._stale: Brief[tuple[str, str], str] = Brief(4096)

    def warm(self) -> None:
        """Import what the first question needs, in the background."""
        if self._on and not self._offline:
            self._threads.submit(lambda: self._client.has_token)

    def close(self) -> None:
        """Stop asking. Questions under way end with their requests' deadlines."""
        self._asking.stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- before a lookup ---------------------------------------------------------------------------------------------

    async def prepare(self, readings: Sequence[HubCall], authorization: str | None) -> str | None:
        """Make the readings of a request known, as far as the upstream has them; returns a warning for the client.

        Raises RepoNotFound, RevisionNotFound, GatedRepo, Forbidden, RateLimited, UpstreamUnavailable, IntegrityError.
        """
        if self._settled(readings):
            return None
        plans = await asyncio.to_thread(self._plan, readings)
        caller = Caller.of(authorization)
        plan = next((plan for plan in plans if plan.step in (Step.HELD, Step.RENEW)), None)
        warning = None
        if plan is None:
            plan = await self._learn(plans, caller)
        elif plan.step is Step.RENEW:
            warning = await self._renew(plan, caller)
        if plan is not None and plan.followed:
            await self._let_in(plan, caller)
        return warning

    def _settled(self, readings: Sequence[HubCall]) -> bool:
        """Whether all that is known of the likeliest reading is in memory, and the upstream has no part in it."""
        call = readings[0]
        try:
            repo = RepoId.parse(call.id, call.kind)
        except InvalidInput:
            return False
        return self.is_own(repo, call.revision or DEFAULT_REVISION)

    def _plan(self, readings: Sequence[HubCall]) -> list[Plan]:
        plans = []
        for call in readings:
            try:
                if call.kind in KINDS:
                    repo = RepoId.parse(call.id, call.kind)
                    plans.append(self._plan_one(repo, check_revision(call.revision or DEFAULT_REVISION)))
            except InvalidInput:  # the lookup says what is wrong with it
                continue
        return plans

    def _plan_one(self, repo: RepoId, revision: str) -> Plan:
        followed = self.state.restricted(repo) is not None
        if followed and not is_commit(revision):
            known = self.state.ref(repo, revision)
            if known is not None:
                step = step_for_ref(rule_for(self._rules, repo, revision), known, self.state.now())
                asking = self._on and not self._offline
                return Plan(repo, revision, step if asking else Step.HELD, True)
        try:
            self._catalog.resolve(repo, revision)
            return Plan(repo, revision, Step.HELD, followed)
        except (RepoNotFound, RevisionNotFound) as error:
            if is_commit(revision) and followed and self.state.has_snapshot(repo, revision):
                return Plan(repo, revision, Step.HELD, True)
            ours = isinstance(error, RevisionNotFound) and not followed and not self._is_upstreams(repo)
        step = step_for_ref(rule_for(self._rules, repo, revision), None, self.state.now())
        return Plan(repo, revision, Step.LOCAL if ours or not self._on else step, True)

    def _is_upstreams(self, repo: RepoId) -> bool:
        """Whether what is held of the repository was pulled from this upstream: one published here has no other."""
        try:
            commits = set(self._catalog.refs(repo).values())
            records = [self._catalog.commit_record(repo, commit) for commit in commits]
        except (RepoNotFound, RevisionNotFound):
            return False
        return bool(records) and all(record.lineage.get("upstream") == self._client.lineage(repo) for record in records)

    async def _learn(self, plans: Sequence[Plan], caller: Caller) -> Plan | None:
        """Ask for the readings in turn; returns the one that the upstream knows, None when it must not be asked."""
        problem: NotFound | None = None
        for plan in plans:
            if plan.step is not Step.LEARN:
                continue
            if self._offline:
                kind = RepoNotFound if self.state.restricted(plan.repo) is None else RevisionNotFound
                what = f"the registry holds no {plan.repo.id}@{plan.revision}"
                problem = problem or kind(f"{what}, and it is offline: {self._client.endpoint} is not asked")
                continue
            key = ("learn", str(plan.repo), plan.revision, caller.id)
            work = functools.partial(self._asking.learn, plan.repo, plan.revision, caller)
            try:
                await self._share(key, work, ANSWER_S)
                return plan
            except NotFound as error:
                problem = problem or error
        if problem is not None:
            raise problem
        return None

    async def _renew(self, plan: Plan, caller: Caller) -> str | None:
        """Ask whether the ref has moved; what goes wrong is a warning."""
        key = str(plan.repo), plan.revision
        warning = self._stale.get(key)
        if warning is None:
            try:
                work = functools.partial(self._asking.renew, plan.repo, plan.revision, caller)
                await self._share(("renew", *key), work, RENEW_S)
            except HeliosError as error:
                warning = f"{plan.repo.id}@{plan.revision} may be out of date: {error.message}"
                self._stale.put(key, warning, NO_S)
                log.warning("a ref could not be renewed", extra={"repo": key[0], "ref": key[1], "error": error.message})
        return warning

    async def _let_in(self, plan: Plan, caller: Caller) -> None:
        """Raise what the upstream says to a caller who may not read a restricted repository."""
        if not await asyncio.to_thread(self.state.restricted, plan.repo) or self._asking.allowed(plan.repo, caller):
            return
        if not self._on or self._offline:
            why = "offline" if self._offline else "not following its upstream (registry.mirror is off)"
            raise GatedRepo(f"{plan.repo.id} is not public, and who may read it can't be asked: the registry is {why}")
        commit, path = await asyncio.to_thread(self._some_file, plan)
        work = functools.partial(self._asking.check, plan.repo, commit, path, caller)
        await self._share(("access", str(plan.repo), caller.id), work, ANSWER_S)

    def _some_file(self, plan: Plan) -> tuple[str, str]:
        """The largest file of the revision: a gate may leave a README open."""
        commit = self.commit_of(plan.repo, plan.revision) or plan.revision
        found = self.state.snapshot(plan.repo, commit)
        if found is None:
            commit = self._catalog.resolve(plan.repo, commit).commit
            sizes = {path: entry.size for path, entry in self._catalog.manifest(plan.repo, commit).files.items()}
        else:
            sizes = {path: file.size for path, file in found.files.items()}
        return commit, max(sizes, key=lambda path: (sizes[path], path))

    async def _share(self, key: tuple[str, ...], work: Callable[[], None], deadline_s: float) -> None:
        """Have a thread do the work, once for all who want it now; it goes on when they have left."""
        with self._lock:
            future = self._shared.get(key)
            if future is None:
                future = self._threads.submit(work)
                self._shared[key] = future
        if future.done():  # it may have been at once
            self._unshare(key, future)
        else:
            future.add_done_callback(functools.partial(self._unshare, key))
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            raise unavailable(self._client.endpoint, f"no answer within {deadline_s:g} s") from None

    def _unshare(self, key: tuple[str, ...], future: Future[None]) -> None:
        with self._lock:
            if self._shared.get(key) is future:
                del self._shared[key]

    # --- lookups -----------------------------------------------------------------------------------------------------

    def is_own(self, repo: RepoId, revision: str) -> bool:
        """Whether memory says that the revision is held and the repository not followed. Does not block."""
        return self.state.is_own(repo) and self._catalog.knows(repo, revision)

    def commit_of(self, repo: RepoId, revision: str) -> str | None:
        """Where a followed ref points; None for a commit, and for a ref that is not followed."""
        if is_commit(revision) or self.state.restricted(repo) is None:
            return None
        known = self.state.ref(repo, revision)
        return None if known is None else known.commit

    def snapshot(self, repo: RepoId, commit: str) -> Mirrored | None:
        """A commit of which the listing is known."""
        return self.state.snapshot(repo, commit) if is_commit(commit) else None

    def refs(self, repo: RepoId) -> dict[str, str]:
        """The refs that are followed."""
        if self.state.restricted(repo) is None:
            return {}
        return {known.ref: known.commit for known in self.state.refs(repo)}

    def restricted(self, repo: RepoId) -> bool:
        """Whether not everybody may read the repository."""
        return self.state.restricted(repo) or False

    def all_restricted(self) -> set[str]:
        """The canonical names of all restricted repositories."""
        return self.state.all_restricted()

    def placed(self, found: Mirrored, path: str) -> PlacedBlob | None:
        """Where the store has a mirrored file; None when it does not yet."""
        sha256 = self.state.stored(found.snapshot.repo, found.files[path])
        if sha256 is None:
            return None
        self._admitting.check(found, path, sha256)
        return self._catalog.placed_blob(sha256)

    # --- bytes -------------------------------------------------------------------------------------------------------

    async def fetch(self, found: Mirrored, path: str, authorization: str | None) -> tuple[Flight, PlacedBlob | None]:
        """The download of a file that is not here, begun or joined; and where it is, if it came a moment ago."""
        token = Caller.of(authorization).token if self.restricted(found.snapshot.repo) else None
        flight, placed = await asyncio.to_thread(self._fetch, found, path, token)
        if self._admitting.whole_first(found, path):
            if not await landed(flight, ANSWER_S):
                raise Unavailable(f"{path} of {found.snapshot.repo.id} is served when it is whole and was looked at")
            placed = await asyncio.to_thread(self.placed, found, path)
        return flight, placed

    def _fetch(self, found: Mirrored, path: str, token: str | None) -> tuple[Flight, PlacedBlob | None]:
        if self._offline or not self._on:
            raise unavailable(self._client.endpoint, f"{path} is not here, and the registry does not fetch")
        snapshot = found.snapshot
        if self._catalog.admission.rule(snapshot.repo).signature == "ignore":
            self._completing.track(snapshot, token)
        else:
            self._completing.complete(snapshot, token)
        flight = self._flights.join(snapshot.repo, snapshot.commit, found.files[path], token)
        return flight, None if flight.entry is None else self._catalog.placed_blob(flight.entry.sha256)

    def stream(
        self, flight: Flight, start: int, stop: int, reader: VerifiedReader, wanted: Wanted
    ) -> AsyncGenerator[FilePart, None]:
        """The bytes ``start`` to ``stop`` of a file that is coming, as they come; from the store if it just came."""

        async def stored() -> AsyncGenerator[FilePart, None]:
            entry = flight.entry
            placed = None if entry is None else await asyncio.to_thread(self._catalog.placed_blob, entry.sha256)
            if placed is None:
                raise again(flight.error or Unavailable(f"{wanted.path} is gone again: ask once more"))
            async with contextlib.aclosing(reader.parts(placed, start, stop, wanted)) as parts_:
                async for part in parts_:
                    yield part

        return parts(flight, self._client, start, stop, stored)

    # --- what waits for approval -------------------------------------------------------------------------------------

    def followed(self) -> list[tuple[FollowedRef, str]]:
        """Every followed ref with its policy's name."""
        out: list[tuple[FollowedRef, str]] = []
        for known in self.state.refs():
            repo = RepoId.from_canonical(known.repository)
            out.append((known, rule_for(self._rules, repo, known.ref).policy))
        return out

    def approve(self, repo: RepoId, ref: str, commit: str) -> None:
        """Let a ref move to the commit that waits. Raises RevisionNotFound or Conflict."""
        self.state.approve(repo, ref, commit)
        found = self.state.snapshot(repo, commit)
        if found is not None:
            self._completing.learnt(found.snapshot, None)
