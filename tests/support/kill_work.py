"""Clients at work on a registry that is killed: each has a kind of work and repositories of its own.

A step does one thing at one of the registry's processes, or several of which each may be the last. It raises what its
request failed with; whether that may be is for whoever runs it to say (kill_run.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import random
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from helios.errors import Conflict, NotFound, Quarantined
from helios.http.client import HttpClient, error_of
from helios.names import RepoId
from helios.publish import publish
from helios.registry_client import RegistryClient
from heliosfs.store.manifest import Manifest
from registry.hub.upload.repos import ATTRIBUTES
from tests.support.kill_journal import MIB, Journal, Tree
from tests.support.mounts import write
from tests.support.upstream import Upstream

TIMEOUT_S = 60.0
EVIL = pickle.dumps(print)
"""Kept back by every registry: it imports what is not a model's."""


class Process(Protocol):
    """One of the registry's processes, which comes back at the same address when it was killed."""

    url: str


@contextlib.contextmanager
def client(process: Process) -> Iterator[RegistryClient]:
    with contextlib.closing(RegistryClient(HttpClient(process.url, timeout_s=TIMEOUT_S))) as found:
        yield found


def ask(process: Process, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """One request; raises the registry's errors and those of the network."""
    with contextlib.closing(HttpClient(process.url, timeout_s=TIMEOUT_S)) as http:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        with http.request(method, path, headers=sent, body=body) as response:
            data = response.read()
    if response.status >= 400:
        raise error_of(response.status, _as_native(data), f"{method} {path}")
    return response.status, data


def _as_native(data: bytes) -> bytes:
    """The Hub API's errors in the form of the native API's."""
    with contextlib.suppress(ValueError):
        document = json.loads(data)
        if isinstance(document.get("error"), str):
            error = {"code": document.get("code", ""), "message": document["error"], "hint": None}
            return json.dumps({"error": error}).encode()
    return data


def tree_of(registry: RegistryClient, repo: RepoId, commit: str) -> Tree:
    manifest = Manifest.decode(registry.manifest(repo, commit))
    return frozenset((path, entry.sha256) for path, entry in manifest.files.items())


@dataclass
class Work:
    """What all kinds have in common. ``processes`` are asked in any order."""

    processes: list[Process]
    journal: Journal
    rng: random.Random
    root: Path
    number: int
    steps: int = 0
    turns: dict[str, int] = field(default_factory=dict)
    pause_s: float = 0.0

    def any(self) -> Process:
        return self.rng.choice(self.processes)

    def count(self, what: str) -> None:
        self.turns[what] = self.turns.get(what, 0) + 1

    def weights(self) -> tuple[tuple[int, int], ...]:
        """A file that shares chunks with others, often with a part of its own."""
        blocks = [(MIB, self.rng.randrange(8)) for _ in range(self.rng.randint(1, 3))]
        if self.rng.random() < 0.5:
            blocks.append((self.rng.randrange(1, 200_000), self.rng.randrange(1 << 30)))
        return tuple(blocks)

    def step(self) -> None:
        raise NotImplementedError

    def files(self, *, config: bool = True) -> tuple[dict[str, bytes], Tree]:
        data, sha256 = self.journal.file(*self.weights())
        files, tree = {"model.bin": data}, {("model.bin", sha256)}
        if config:
            data, sha256 = self.journal.file((self.rng.randrange(1, 300), self.rng.randrange(1 << 30)))
            files["config.txt"] = data
            tree.add(("config.txt", sha256))
        return files, frozenset(tree)

    def push(self, repo: RepoId, ref: str, files: Mapping[str, bytes], tree: Tree) -> str:
        directory = self.root / f"push-{self.number}"
        for path in directory.glob("*"):
            path.unlink()
        write(directory, files)
        with self.journal.changing(str(repo), {ref: tree}), client(self.any()) as registry:
            return publish(registry, directory, repo, ref).commit


class Pushing(Work):
    """helios push: new models, fine-tunes that share chunks, the same again; refs and repositories are removed."""

    last: tuple[dict[str, bytes], Tree] | None = None

    def step(self) -> None:
        repo, choice = RepoId.parse(f"org/p{self.number}"), self.rng.random()
        if choice < 0.1:
            with self.journal.changing(str(repo), dict.fromkeys(self.journal.refs(str(repo)))):
                with client(self.any()) as registry:
                    _missing_is_fine(lambda: registry.delete(repo))
            return self.count("repository removed")
        if choice < 0.25:
            refs = [ref for ref in self.journal.refs(str(repo)) if ref != "main"]
            if refs:
                ref = self.rng.choice(refs)
                with self.journal.changing(str(repo), {ref: None}), client(self.any()) as registry:
                    _missing_is_fine(lambda: registry.delete(repo, ref))
                return self.count("ref removed")
        if self.last is None or self.rng.random() < 0.8:
            self.last = self.files()
        ref = "main" if self.rng.random() < 0.5 else f"v{self.rng.randrange(4)}"
        self.push(repo, ref, *self.last)
        self.count("push")


def _missing_is_fine(call: Any) -> None:
    with contextlib.suppress(NotFound):
        call()


class Uploading(Work):
    """The Hub's calls: preupload, LFS batch, PUT, verify, commit, each to any process."""

    def step(self) -> None:
        repo = RepoId.parse(f"org/h{self.number}")
        name = str(repo)
        try:
            with client(self.any()) as registry:
                at = registry.resolve(repo, "main").commit
                base = dict(tree_of(registry, repo, at))
        except NotFound:
            return self._create(repo)
        operations: list[dict[str, Any]] = []
        large, sha256 = self.journal.file(*self.weights())
        path = f"part-{self.rng.randrange(3)}.bin"
        self._send(repo, sha256, large)
        operations.append(
            {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": sha256, "size": len(large)}}
        )
        after = {**base, path: sha256}
        small, sha256 = self.journal.file((self.rng.randrange(1, 5000), self.rng.randrange(1 << 30)))
        operations.append(
            {"key": "file", "value": {"path": "card.txt", "encoding": "base64", "content": b64encode(small).decode()}}
        )
        after["card.txt"] = sha256
        gone = next((each for each in sorted(base) if each.startswith("part-") and each != path), None)
        if gone is not None and self.rng.random() < 0.3:
            operations.append({"key": "deletedFile", "value": {"path": gone}})
            del after[gone]
        header = {"key": "header", "value": {"summary": "more", "parentCommit": at}}
        body = b"".join(json.dumps(line).encode() + b"\n" for line in (header, *operations))
        with self.journal.changing(name, {"main": frozenset(after.items())}):
            ask(self.any(), "POST", f"/api/models/{repo.id}/commit/main", body, content_type="application/x-ndjson")
        self.count("upload")

    def _send(self, repo: RepoId, sha256: str, data: bytes) -> None:
        wanted = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": sha256, "size": len(data)}]}
        _, answer = ask(
            self.any(), "POST", f"/{repo.id}.git/info/lfs/objects/batch", json.dumps(wanted).encode(),
            content_type="application/json",
        )  # fmt: skip
        (found,) = json.loads(answer)["objects"]
        if "actions" in found:
            path = urlsplit(found["actions"]["upload"]["href"]).path
            ask(self.any(), "PUT", path, data)
            verify = urlsplit(found["actions"]["verify"]["href"]).path
            ask(self.any(), "POST", verify, json.dumps({"oid": sha256, "size": len(data)}).encode())

    def _create(self, repo: RepoId) -> None:
        tree = frozenset({(".gitattributes", hashlib.sha256(ATTRIBUTES).hexdigest())})
        org, _, name = repo.id.partition("/")
        with self.journal.changing(str(repo), {"main": tree}):
            ask(self.any(), "POST", "/api/repos/create", json.dumps({"name": name, "organization": org}).encode())
        self.count("create")


class Moving(Work):
    """Compare-and-swap of one ref by several clients; the registry's own audit is compared with what each was told."""

    REPO = RepoId.parse("swap/m")
    shared: list[tuple[str | None, str, str, str]]
    """(old, new, outcome, author) of all who move it."""

    def step(self) -> None:
        with client(self.any()) as registry:
            commits = sorted({c for ref, c in registry.refs(self.REPO).items() if ref.startswith("v")})
            now = registry.resolve(self.REPO, "main").commit
            new = self.rng.choice([c for c in commits if c != now])
            author = f"{self.number}-{self.steps}"
            self.steps += 1
            outcome = "in doubt"
            try:
                registry.set_ref(self.REPO, "main", new, now, author=author)
                outcome = "done"
            except Conflict:
                outcome = "refused"
            finally:
                self.shared.append((now, new, outcome, author))
        self.count(f"move {outcome}")


class Reading(Work):
    """Downloads of whole files and of ranges, of whatever there is."""

    def step(self) -> None:
        process = self.any()
        with client(process) as registry:
            found = [(r.id, ref) for r in registry.repos() for ref in r.refs if not r.id.id.startswith("up/")]
            if not found:
                return
            repo, ref = self.rng.choice(found)
            try:
                commit = registry.resolve(repo, ref).commit
                path, sha256 = self.rng.choice(sorted(tree_of(registry, repo, commit)))
            except NotFound:  # somebody has removed it meanwhile
                return
        data = ATTRIBUTES if path == ".gitattributes" else self.journal.bytes_of(sha256)
        start, stop, headers = 0, len(data), {}
        if self.rng.random() < 0.5 and len(data) > 1:
            start = self.rng.randrange(len(data) - 1)
            stop = self.rng.randrange(start + 1, len(data) + 1)
            headers = {"range": f"bytes={start}-{stop - 1}"}
        try:
            _, body = ask(process, "GET", f"/{repo.id}/resolve/{commit}/{quote(path)}", **headers)
        except (NotFound, Quarantined):
            return
        if body != data[start:stop]:
            raise AssertionError(f"{repo}@{commit} {path} {headers}: {len(body)} bytes that are not those published")
        self.count("read")


class Mirroring(Work):
    """Pull-through and pulls of an upstream whose branches move."""

    hub: Upstream

    def step(self) -> None:
        repo = RepoId.parse(f"up/m{self.number}")
        if f"models/{repo.id}" not in self.hub.repos or self.rng.random() < 0.2:
            data, sha256 = self.journal.file((9 * MIB, self.rng.randrange(1 << 30)), *self.weights())
            small, sha_small = self.journal.file((self.rng.randrange(1, 300), self.rng.randrange(1 << 30)))
            tree = frozenset({("model.bin", sha256), ("config.txt", sha_small)})
            self.journal.tried(str(repo), tree)
            self.hub.commit(repo.id, {"model.bin": data, "config.txt": small})
        process = self.any()
        if self.rng.random() < 0.3:
            with client(process) as registry:
                for _ in registry.pull(repo, "main", timeout_s=TIMEOUT_S):
                    pass
            return self.count("pull")
        path = self.rng.choice(["model.bin", "config.txt"])
        _, body = ask(process, "GET", f"/{repo.id}/resolve/main/{path}")
        known = {
            file.sha256
            for c in self.hub.repos[f"models/{repo.id}"].commits.values()
            for p, file in c.items()
            if p == path
        }
        if hashlib.sha256(body).hexdigest() not in known:
            raise AssertionError(f"{repo} {path}: {len(body)} bytes that the upstream does not have")
        self.count("pull-through")


class Collecting(Work):
    """Garbage collections, and verifications that must find nothing."""

    def step(self) -> None:
        with client(self.any()) as registry:
            if self.rng.random() < 0.2:
                found = list(registry.verify(None, 1.0, repair=False, timeout_s=TIMEOUT_S))[-1]
                if found["damaged"] or found["stray_objects"]:
                    raise AssertionError(f"a verification found {found}")
                return self.count("verification")
            try:
                report = list(registry.collect(dry_run=False, timeout_s=TIMEOUT_S))[-1]
            except Conflict:  # another process' collection was killed or goes on
                return
            if report["problems"]:
                raise AssertionError(f"a collection says {report['problems']}")
        self.count("collection")


class Quarantining(Work):
    """Files that are kept back until somebody lets them go."""

    def step(self) -> None:
        repo = RepoId.parse(f"held/m{self.number}")
        evil = EVIL + b"%x" % self.rng.getrandbits(128)  # another one each time: what was released stays so
        sha256 = self.journal.raw(evil)
        files, tree = self.files(config=False)
        self.push(repo, "main", {**files, "pytorch_model.bin": evil}, tree | {("pytorch_model.bin", sha256)})
        path = f"/{repo.id}/resolve/main/pytorch_model.bin"
        try:
            ask(self.any(), "GET", path)
            raise AssertionError(f"{repo} gives out a file that nobody has released")
        except Quarantined:
            self.count("kept back")
        with client(self.any()) as registry:
            registry.release(repo, sha256, "a person")
        _, body = ask(self.any(), "GET", path)
        if body != evil:
            raise AssertionError(f"{repo}: {len(body)} wrong bytes of a released file")
        self.count("released")


class Carrying(Work):
    """Bundles: a repository is exported, changed or removed, and imported again."""

    bundle: tuple[Path, Tree] | None = None

    def step(self) -> None:
        repo = RepoId.parse(f"box/b{self.number}")
        if self.bundle is None or self.rng.random() < 0.3:
            files, tree = self.files()
            commit = self.push(repo, "main", files, tree)
            path = self.root / f"bundle-{self.number}.tar"
            with client(self.any()) as registry, path.open("wb") as out:
                self.bundle = None
                # By its ref, so that the bundle moves it; the ref is ours alone.
                if registry.resolve(repo, "main").commit != commit:
                    raise AssertionError(f"{repo}: an acknowledged push does not show")
                registry.export_bundle([f"{repo}@main"], [], out)
            self.bundle = path, tree
            return self.count("export")
        choice = self.rng.random()
        if choice < 0.4:
            with self.journal.changing(str(repo), {"main": None}), client(self.any()) as registry:
                _missing_is_fine(lambda: registry.delete(repo))
        path, tree = self.bundle
        with self.journal.changing(str(repo), {"main": tree}), client(self.any()) as registry:
            registry.import_bundle(path)
        self.count("import")


KINDS: tuple[type[Work], ...] = (
    Pushing, Pushing, Uploading, Moving, Moving, Reading, Mirroring, Collecting, Quarantining, Carrying,
)  # fmt: skip
