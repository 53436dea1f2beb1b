"""Pull-through: what a request of the Hub API asks for and the registry does not hold comes from the upstream.

``prepare`` runs before a request is looked up: it makes sure that the revision is known and that the caller may read
it, asking the upstream where that is needed, once for all who wait for the same. The lookups themselves are local.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from helios.config import RegistrySettings
from helios.errors import GatedRepo, InvalidInput, NotFound, RepoNotFound, RevisionNotFound, Unavailable
from helios.http.server import FilePart
from helios.names import KINDS, RepoId, check_ref, check_revision, is_commit
from heliosfs.store.placement import PlacedBlob
from registry.catalog import Catalog
from registry.hub.paths import HubCall
from registry.hub.verified import VerifiedReader, Wanted
from registry.metadata.mirror import FollowedRef, follows_upstream
from registry.mirror.admitting import Admitting
from registry.mirror.asking import DEFAULT_REVISION, Asking, Caller, unavailable
from registry.mirror.completing import Completing
from registry.mirror.names import Names
from registry.mirror.policy import Step, rule_for, step_for_ref
from registry.mirror.questions import ANSWER_S, Questions
from registry.mirror.state import Mirrored, MirrorState
from registry.mirror.stream import landed, parts
from registry.pull.faults import again
from registry.pull.flight import Flight
from registry.pull.listing import RemoteFile, Snapshot
from registry.pull.setup import Pulling
from registry.threads import Threads

log = logging.getLogger("helios.registry.mirror")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a reading of a request needs."""

    repo: RepoId
    revision: str
    step: Step
    followed: bool


class Mirror:
    """One registry's view of its upstream; close it at shutdown."""

    def __init__(self, settings: RegistrySettings, catalog: Catalog, pulling: Pulling, long: Threads) -> None:
        """``long``: threads for what reads a whole file."""
        self._on, self._offline = settings.mirror == "on", pulling.upstream.offline
        self._rules = settings.mirror_rules
        self._catalog, self._client = catalog, pulling.upstream
        self._flights, self._downloads = pulling.flights, pulling.downloads
        self.state = MirrorState(catalog)
        self._completing = Completing(catalog, self.state, pulling.pulls, whole=settings.mirror_complete)
        pulling.flights.listen(self._completing.stored)
        self._asking = Asking(self._client, self.state, self._rules, catalog.admission, self._completing.learnt)
        self._admitting, self._long = Admitting(catalog), long
        self._questions = Questions(self._client.endpoint)
        asking = self._on and not self._offline
        self.names = Names(self.state, self._asking, self._questions, asks=asking)

    def warm(self) -> None:
        """Import what the first question needs, in the background."""
        if self._on and not self._offline:
            self._questions.begin(lambda: self._client.has_token)

    def close(self) -> None:
        """Stop asking. Questions under way end with their requests' deadlines."""
        self._asking.stop.set()
        self._questions.close()

    # --- before a lookup ---------------------------------------------------------------------------------------------

    async def prepare(
        self, readings: Sequence[HubCall], authorization: str | None, *, trusted: bool = False
    ) -> str | None:
        """Make the readings of a request known, as far as the upstream has them; returns a warning for the client.

        The upstream is not asked whether a ``trusted`` caller may read what is here.

        Raises RepoNotFound, RevisionNotFound, Retired, GatedRepo, Forbidden, RateLimited, UpstreamUnavailable,
        IntegrityError.
        """
        if self._settled(readings):
            return None
        plans = await asyncio.to_thread(self._plan, readings)
        caller = Caller.of(authorization)
        plan = next((plan for plan in plans if plan.step in (Step.HELD, Step.RENEW)), None)
        warning = None
        if plan is None:
            for each in plans:
                # Nobody upstream is going to refuse it, and "not found" would tell what there is.
                if not trusted and (self._offline or each.step is Step.LOCAL):
                    await self.admit(each.repo, authorization)
            plan = await self._learn(plans, caller)
        elif plan.step is Step.RENEW:
            warning = await self._renew(plan, caller)
        if plan is not None and plan.followed and not trusted:
            await self._let_in(plan, caller)
        return warning

    async def admit(self, repo: RepoId, authorization: str | None) -> None:
        """For the native API, whose calls never ask for news: raise what the upstream says to a caller who may not
        read a restricted repository; others pass."""
        if self.state.is_own(repo) or not await asyncio.to_thread(self.state.restricted, repo):
            return
        known = await asyncio.to_thread(self._any_revision, repo)
        if known is not None:
            await self._let_in(Plan(repo, known, Step.HELD, True), Caller.of(authorization))

    async def look(self, repo: RepoId, revision: str, *, own_token: bool) -> Snapshot:
        """What the upstream has at a revision of which nothing is known here; nothing is kept of it but a refusal, for
        a short while. ``own_token``: it is asked as the registry, not as anybody. Raises as ``prepare`` does."""
        if self._offline:
            raise unavailable(self._client.endpoint, "the registry is offline")
        work = functools.partial(self._asking.look, repo, revision, own_token=own_token)
        key = ("look", str(repo), revision, "own" if own_token else "")
        return await self._questions.ask(key, work, ANSWER_S)

    async def check_own(self, repo: RepoId, ref: str, authorization: str | None, *, trusted: bool = False) -> None:
        """Raise Conflict for a ref of a followed repository that the upstream has, so that it is not for pushes.

        Raises what the upstream says to a caller who may not read the repository, and UpstreamUnavailable where it
        can't be asked whether it has such a ref. The upstream is never asked for a repository that is not followed.
        """
        if self.state.is_own(repo) or await asyncio.to_thread(self.state.restricted, repo) is None:
            return
        if not trusted:
            await self.admit(repo, authorization)
        plan = await asyncio.to_thread(self._plan_one, repo, check_ref(ref))
        if plan.step is Step.LEARN and not self._offline:
            with contextlib.suppress(NotFound):  # the upstream has none: it may be made here
                await self._learn([plan], Caller.of(authorization))
        if await asyncio.to_thread(self.state.ref, repo, ref) is not None:
            raise follows_upstream(repo, ref)

    def _any_revision(self, repo: RepoId) -> str | None:
        """A revision of which the files are known; None: then there is nothing to read."""
        try:
            held = self._catalog.refs(repo)
        except RepoNotFound:
            held = {}
        commits = [*held.values(), *(known.commit for known in self.state.refs(repo))]
        return next(iter(commits), None)

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
            if known is None and revision in self.state.detached(repo):
                return Plan(repo, revision, Step.HELD if self._catalog.holds(repo, revision) else Step.LOCAL, True)
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
            records = self._catalog.heads(repo)
        except RepoNotFound:
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
                await self._questions.ask(key, work, ANSWER_S)
                return plan
            except NotFound as error:
                problem = problem or error
        if problem is not None:
            raise problem
        return None

    async def _renew(self, plan: Plan, caller: Caller) -> str | None:
        """Ask whether the ref has moved; what goes wrong is a warning."""
        work = functools.partial(self._asking.renew, plan.repo, plan.revision, caller)
        key = "renew", str(plan.repo), plan.revision
        return await self._questions.attempt(key, work, f"{plan.repo.id}@{plan.revision} may be out of date")

    async def _let_in(self, plan: Plan, caller: Caller) -> None:
        """Raise what the upstream says to a caller who may not read a restricted repository."""
        if not await asyncio.to_thread(self.state.restricted, plan.repo) or self._asking.allowed(plan.repo, caller):
            return
        if not self._on or self._offline:
            why = "offline" if self._offline else "not following its upstream (registry.mirror is off)"
            raise GatedRepo(f"{plan.repo.id} is not public, and who may read it can't be asked: the registry is {why}")
        commit, path = await asyncio.to_thread(self._some_file, plan)
        work = functools.partial(self._asking.check, plan.repo, commit, path, caller)
        await self._questions.ask(("access", str(plan.repo), caller.id), work, ANSWER_S)

    def _some_file(self, plan: Plan) -> tuple[str, str]:
        """The largest file of the revision: a gate may leave a README open."""
        commit = self.commit_of(plan.repo, plan.revision) or plan.revision
        found = self.state.snapshot(plan.repo, commit)
        if found is None:
            commit = self._catalog.resolve(plan.repo, commit).commit
            sizes = {
                path: entry.size for path, entry in self._catalog.contents.manifest(plan.repo, commit).files.items()
            }
        else:
            sizes = {path: file.size for path, file in found.files.items()}
        return commit, max(sizes, key=lambda path: (sizes[path], path))

    # --- lookups -----------------------------------------------------------------------------------------------------

    def is_own(self, repo: RepoId, revision: str) -> bool:
        """Whether memory says that the revision is held and the repository not followed. Does not block."""
        return self.state.is_own(repo) and self._catalog.resolved_now(repo, revision) is not None

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

    def listed_refs(self, repo: RepoId, *, requests: bool) -> dict[str, str]:
        """The upstream's refs by their full names, as far as they are known."""
        if self.state.restricted(repo) is None:
            return {}
        found = [self.state.listed(repo, each) for each in ((False, True) if requests else (False,))]
        return {ref: commit for known in found if known is not None for ref, commit in known.targets.items()}

    def restricted(self, repo: RepoId) -> bool:
        """Whether not everybody may read the repository."""
        return self.state.restricted(repo) or False

    def all_restricted(self) -> set[str]:
        """The canonical names of all restricted repositories."""
        return self.state.all_restricted()

    def hidden_from(self, authorization: str | None) -> set[str]:
        """The canonical names of the restricted repositories that a list doesn't show to a caller: nobody is asked for
        it, so it shows those to which the upstream has let him in lately."""
        caller = Caller.of(authorization)
        restricted = self.state.all_restricted()
        return {name for name in restricted if not self._asking.allowed(RepoId.from_canonical(name), caller)}

    def followed_repos(self, kind: str) -> dict[RepoId, dict[str, str]]:
        """The repositories of a kind that are followed, with their refs."""
        out: dict[RepoId, dict[str, str]] = {}
        for known in self.state.refs():
            repo = RepoId.from_canonical(known.repository)
            if repo.kind == kind:
                out.setdefault(repo, {})[known.ref] = known.commit
        return out

    def placed(self, found: Mirrored, path: str) -> PlacedBlob | None:
        """Where the store has a mirrored file; None when it does not yet. ``admit`` says whether it may leave."""
        repo, file = found.snapshot.repo, found.files[path]
        sha256 = self.state.stored(repo, file)
        return None if sha256 is None else self._placed(repo, file, sha256)

    def at_once(self, found: Mirrored, sha256: str) -> bool:
        """Whether a file of the Large File Storage may leave as soon as it is here, whatever else the commit holds."""
        paths = [path for path, file in found.files.items() if file.sha256 == sha256]
        return bool(paths) and not any(self._admitting.whole_first(found, path) for path in paths)

    def listed(self, repo: RepoId, commit: str, sha256: str) -> PlacedBlob | None:
        """Where the store has a file of the Large File Storage that a mirrored commit lists, published or not.

        None where it lists no such file, where it is not here, and where it must not leave yet.
        """
        found = self.snapshot(repo, commit)
        if found is None or not self.at_once(found, sha256):
            return None
        path = next(path for path, file in found.files.items() if file.sha256 == sha256)
        return self.placed(found, path)

    # --- bytes -------------------------------------------------------------------------------------------------------

    async def admit_file(self, found: Mirrored, path: str, placed: PlacedBlob) -> None:
        """Raise NotAdmitted or Quarantined for a stored file that must not leave, Unavailable where it is too soon."""
        if self._admitting.whole_first(found, path):
            await self._long(self._admitting.check, found, path, placed.recipe.blob)

    async def fetch(self, found: Mirrored, path: str, authorization: str | None) -> tuple[Flight, PlacedBlob | None]:
        """The download of a file that is not here, begun or joined; and where it is, if it came a moment ago."""
        token = Caller.of(authorization).token if self.restricted(found.snapshot.repo) else None
        flight, placed = await asyncio.to_thread(self._fetch, found, path, token)
        if self._admitting.whole_first(found, path):
            if not await landed(flight, ANSWER_S):
                raise Unavailable(f"{path} of {found.snapshot.repo.id} is served when it is whole and was looked at")
            placed = await asyncio.to_thread(self.placed, found, path)
            if placed is not None:
                await self.admit_file(found, path, placed)
        return flight, placed

    def bring(self, found: Mirrored, path: str, authorization: str | None) -> Flight | None:
        """Begin or join the download of a file that nobody can read yet; None: it is here. Blocks.

        Raises Unavailable, NoSpace, QuotaExceeded, UpstreamUnavailable.
        """
        token = Caller.of(authorization).token if self.restricted(found.snapshot.repo) else None
        flight = None if self.placed(found, path) is not None else self._fetch(found, path, token)[0]
        if self._admitting.whole_first(found, path):
            self._completing.complete(found.snapshot, token)
        return flight

    def _fetch(self, found: Mirrored, path: str, token: str | None) -> tuple[Flight, PlacedBlob | None]:
        if self._offline or not self._on:
            raise unavailable(self._client.endpoint, f"{path} is not here, and the registry does not fetch")
        snapshot = found.snapshot
        if self._catalog.admission.rule(snapshot.repo).signature == "ignore":
            self._completing.track(snapshot, token)
        else:
            self._completing.complete(snapshot, token)
        flight = self._flights.join(snapshot.repo, snapshot.commit, found.files[path], token)
        return flight, self._landed(flight)

    def _landed(self, flight: Flight) -> PlacedBlob | None:
        """Where a download has been stored; None while it has not."""
        return None if flight.entry is None else self._placed(flight.repo, flight.file, flight.entry.sha256)

    def _placed(self, repo: RepoId, file: RemoteFile, sha256: str) -> PlacedBlob | None:
        self._downloads.adopt(repo, file, sha256)
        return self._catalog.contents.placed_blob(self._catalog.domain_of(repo), sha256)

    def stream(
        self, flight: Flight, start: int, stop: int, reader: VerifiedReader, wanted: Wanted
    ) -> AsyncGenerator[FilePart, None]:
        """The bytes ``start`` to ``stop`` of a file that is coming, as they come; from the store if it just came."""

        async def stored() -> AsyncGenerator[FilePart, None]:
            placed = await asyncio.to_thread(self._landed, flight)
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

    def detach(self, repo: RepoId, ref: str) -> None:
        """Follow a ref no more: what is pushed counts from now on. Raises RevisionNotFound for one that isn't.

        What is published of it stays; the upstream is asked for it again when somebody has removed it.
        """
        self.state.detach(repo, ref)
        log.warning("a ref follows its upstream no more", extra={"repo": str(repo), "ref": ref})
