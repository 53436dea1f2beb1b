"""A store that lies: about sizes, ranges, recipes, placements and manifests. Each lie ends as EIO with a reason in the
log, or does no harm; never as a wrong byte; and another model on the same mount notices nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helios.config import Config
from helios.embedded import attach
from helios.home import Home
from helios.names import RepoId
from helios.publish import publish, scan
from helios.registry_client import RegistryClient
from heliosfs.store.manifest import Manifest
from heliosfs.store.recipe import MAX_CHUNK
from tests.support.front import LIES, Asked, Front, Strike, nothing
from tests.support.mounts import MODES, Mount, mounted, run, write
from tests.support.reading import drop_names, outcome, within

pytestmark = pytest.mark.fuse

MADE = random.Random(11)
DEADLINE_S = 0.5
SIZE = MAX_CHUNK + 5000
"""Two chunks."""


@dataclass
class Scene:
    mount: Mount
    front: Front
    registry: RegistryClient
    base: Path
    untouched: dict[str, bytes]
    """Files of ``org/good`` that nobody has read."""

    def publish(self, name: str, files: dict[str, bytes]) -> str:
        directory = write(self.base / name, files)
        return publish(self.registry, directory, RepoId.parse(name), "main", files=scan(directory)).commit

    def read(self, path: Path) -> bytes | int:
        def call() -> bytes:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return file.read()

        return within(60, lambda: outcome(call))


def scenes(argument: str, cases: Sequence[Any], everywhere: Sequence[Any]) -> pytest.MarkDecorator:
    """All ``cases`` in the first mode; in the others those from ``everywhere``, one for each way to the kernel that a
    failure takes: what is checked before that is the same in all."""
    found = [
        pytest.param(mode, case, id=f"{mode}-{case}")
        for mode in MODES
        for case in (cases if mode == MODES[0] else everywhere)
    ]
    return pytest.mark.parametrize(("scene", argument), found, indirect=["scene"])


@pytest.fixture(scope="module")
def scene_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Scene]]:
    """The mount of each mode, made when it is first asked for."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda mode: stack.enter_context(lied_at(tmp_path_factory.mktemp(mode), mode)))


@pytest.fixture
def scene(scene_of: Callable[[str], Scene], request: pytest.FixtureRequest) -> Scene:
    return scene_of(request.param)


@contextlib.contextmanager
def lied_at(base: Path, mode: str) -> Iterator[Scene]:
    home = Home(base / "home")
    environ = {**os.environ, "HELIOS_HOME": str(home.root)}
    settings = {"HELIOS_MOUNT__MODE": mode, "HELIOS_MOUNT__REQUEST_DEADLINE_S": f"{DEADLINE_S:g}"}
    with (
        attach(Config(), home, environ) as registry,
        Front(registry.urls[0]) as front,
        contextlib.closing(registry.client()) as client,
        mounted(home, base / "mnt", "--registry", front.url, **settings) as mount,
    ):
        scene = Scene(mount, front, client, base, {f"{n}.txt": MADE.randbytes(50_000 + n) for n in range(70)})
        scene.publish("org/good", scene.untouched)
        yield scene


@pytest.fixture
def good(scene: Scene) -> Iterator[None]:
    """Another model can be read whatever is said of one: its names, and bytes that were never fetched."""
    yield
    name, data = scene.untouched.popitem()
    assert scene.read(scene.mount.path / "org/good/@main" / name) == data
    scene.front.plan = nothing


def lie_about(part: str, subject: str, strike: Strike) -> Callable[[Asked], Strike | None]:
    """What would be told ahead of the commit is not told: each thing is asked for by itself."""

    def plan(asked: Asked) -> Strike | None:
        if subject in asked.path and part in asked.path:
            return strike
        return Strike("status") if subject in asked.path and "/content" in asked.path else None

    return plan


@pytest.mark.usefixtures("good")
@scenes(
    "lie",
    [
        *(("/objects/", kind) for kind in LIES),
        *((part, kind) for part in ("/placements", "/recipe", "/manifest") for kind in ("endless", "longer")),
        ("/commits", "redirect"),
    ],
    [("/objects/", "shorter"), ("/recipe", "longer"), ("/manifest", "longer"), ("/commits", "redirect")],
)
def test_an_answer_that_lies_is_eio(scene: Scene, lie: tuple[str, Any]) -> None:
    part, kind = lie
    name = f"bad/{part.strip('/')}-{kind}-{MADE.randrange(1 << 30)}"
    data = MADE.randbytes(SIZE)
    commit = scene.publish(name, {"data.txt": data})
    subject = hashlib.sha256(data).hexdigest() if part == "/objects/" else name.replace("/", "%2F")
    scene.front.plan = lie_about(part, subject, Strike(kind, after=40))
    struck = scene.front.struck[kind]
    found = scene.read(scene.mount.path / name / commit / "data.txt")
    assert found == errno.EIO
    assert scene.front.struck[kind] > struck
    scene.front.plan = nothing
    right_at_last(scene, scene.mount.path / name / commit / "data.txt", data)


def right_at_last(scene: Scene, path: Path, data: bytes) -> None:
    """Once nobody lies the file can be read."""
    end = time.monotonic() + 30
    while (found := scene.read(path)) == errno.EIO:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert found == data


HUGE = 10**30
PLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "overlap": lambda p: p | {"runs": [p["runs"][0] | {"count": 2}, p["runs"][0] | {"first": 1, "count": 1}]},
    "gap": lambda p: p | {"runs": [p["runs"][0] | {"count": 1}]},
    "no run": lambda p: p | {"runs": []},
    "empty run": lambda p: p | {"runs": [p["runs"][0] | {"count": 0}]},
    "beyond the object": lambda p: p | {"runs": [p["runs"][0] | {"offset": SIZE}]},
    "before the object": lambda p: p | {"runs": [p["runs"][0] | {"offset": -1}]},
    "a little shifted": lambda p: (
        p | {"runs": [p["runs"][0] | {"offset": 1}], "objects": [p["objects"][0] | {"size": SIZE + 1}]}
    ),
    "huge offset": lambda p: (
        p | {"runs": [p["runs"][0] | {"offset": 1 << 62}], "objects": [p["objects"][0] | {"size": (1 << 63) - 1}]}
    ),
    "larger than a number": lambda p: p | {"runs": [p["runs"][0] | {"offset": HUGE}]},
    "huge count": lambda p: p | {"runs": [p["runs"][0] | {"count": (1 << 62)}]},
    "a smaller object": lambda p: p | {"objects": [p["objects"][0] | {"size": SIZE - 1}]},
    "an object that is not there": lambda p: p | {"objects": [p["objects"][0] | {"url": "/api/v1/objects/no"}]},
    "a host that is not there": lambda p: p | {"objects": [p["objects"][0] | {"url": "http://127.0.0.1:1/x"}]},
    "another blob": lambda p: p | {"blob": "0" * 64},
    "a lease of nothing": lambda p: p | {"lease_s": 0},
    "very many objects": lambda p: p | {"objects": p["objects"] * 5_000},
    "no object": lambda p: [],
}  # fmt: skip


@pytest.mark.usefixtures("good")
@scenes("lie", list(PLACEMENTS), ["overlap", "another blob", "a lease of nothing"])
def test_a_placement_that_lies_is_eio_or_does_no_harm(scene: Scene, lie: str) -> None:
    name = f"bad/placement-{sorted(PLACEMENTS).index(lie)}"
    data = MADE.randbytes(SIZE)
    commit = scene.publish(name, {"data.txt": data})
    change = PLACEMENTS[lie]
    strike = Strike("changed", change=lambda body: json.dumps(change(json.loads(body))).encode())
    scene.front.plan = lie_about("/placements", name.replace("/", "%2F"), strike)
    found = scene.read(scene.mount.path / name / commit / "data.txt")
    assert found == (data if lie == "a lease of nothing" else errno.EIO)
    if found == errno.EIO:
        assert f"models/{name} data.txt at byte 0" in scene.mount.log()
    scene.front.plan = nothing
    right_at_last(scene, scene.mount.path / name / commit / "data.txt", data)


@pytest.mark.usefixtures("good")
@scenes("lie", [*PLACEMENTS, "recipe", "endless", "longer", "truncate"], ["recipe"])
def test_what_is_told_ahead_may_lie(scene: Scene, lie: str) -> None:
    """It is checked like anything else, and asked for again, each thing by itself."""
    name = f"bad/ahead-{lie.replace(' ', '-')}"
    data = MADE.randbytes(SIZE)

    def change(body: bytes) -> bytes:
        content = json.loads(body)
        for blob in content["blobs"]:
            if lie == "recipe":
                blob["recipe"] = blob["recipe"][:-8] + "AAAAAAAA"
            else:
                blob["placement"] = PLACEMENTS[lie](blob["placement"])
        return json.dumps(content).encode()

    kinds: dict[str, Any] = {kind: Strike(kind, after=40) for kind in ("endless", "longer", "truncate")}
    strike = kinds.get(lie) or Strike("changed", change=change)
    subject, struck = name.replace("/", "%2F"), scene.front.struck[strike.kind]
    scene.front.plan = lambda asked: strike if "/content" in asked.path and subject in asked.path else None
    commit = scene.publish(name, {"data.txt": data})
    right_at_last(scene, scene.mount.path / name / commit / "data.txt", data)
    assert scene.front.struck[strike.kind] > struck


def liar_and_twin(scene: Scene, name: str, data: bytes, size: int) -> tuple[Path, Path]:
    """A file whose manifest and commit give it this size, and one of the same content under an honest manifest."""
    commit, twin = (scene.publish(each, {"data.txt": data}) for each in (name, f"{name}-twin"))
    entry = Manifest.decode(scene.registry.manifest(RepoId.parse(name), commit)).files["data.txt"]
    forged = Manifest({"data.txt": msgspec.structs.replace(entry, size=size)})

    def plan(asked: Asked) -> Strike | None:
        if f"repo=models%2F{name.replace('/', '%2F')}&" not in asked.path:
            return None
        if "/manifest" in asked.path:
            return Strike("changed", change=lambda body: forged.encode())
        if "/commits" in asked.path:
            true = Manifest({"data.txt": entry}).digest.encode()
            return Strike("changed", change=lambda body: body.replace(true, forged.digest.encode()))
        return None

    scene.front.plan = plan
    return scene.mount.path / name / commit / "data.txt", scene.mount.path / f"{name}-twin" / twin / "data.txt"


@pytest.mark.usefixtures("good")
@scenes("size", [0, 1, SIZE - 1, SIZE + 1, SIZE + (1 << 40), (1 << 63) - 1], [0, SIZE - 1, (1 << 63) - 1])
def test_a_manifest_whose_sizes_are_wrong_gives_no_wrong_byte(scene: Scene, size: int) -> None:
    """The manifest and the commit's record agree with each other; the file's recipe does not. Who has the same content
    under an honest manifest sees its own size and its own bytes."""
    data = MADE.randbytes(SIZE)
    path, honest = liar_and_twin(scene, f"bad/manifest-{size}", data, size)
    assert honest.stat().st_size == SIZE
    assert within(30, path.stat).st_size == size

    def some() -> bytes:
        with path.open("rb") as file:
            return os.pread(file.fileno(), 4096, max(0, size // 2 - 10))

    assert within(60, lambda: outcome(some)) == errno.EIO
    assert honest.stat().st_size == SIZE
    right_at_last(scene, honest, data)  # the other one is let go of a moment after its close
    drop_names(scene.mount.path)
    assert within(30, path.stat).st_size == size
    assert (honest.stat().st_size, scene.read(honest)) == (SIZE, data)


@contextlib.contextmanager
def lied_to(path: Path) -> Iterator[None]:
    """Hold the liar open for as long as it lets itself be opened, and read it: EIO."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        yield
        return
    try:
        assert within(60, lambda: outcome(lambda: os.pread(fd, 100, 0))) == errno.EIO
        yield
        assert within(60, lambda: outcome(lambda: os.pread(fd, 100, 0))) == errno.EIO
    finally:
        os.close(fd)


@pytest.mark.usefixtures("good")
@scenes("size", [SIZE - 1, SIZE + 1], [SIZE - 1, SIZE + 1])
def test_a_size_that_is_wrong_takes_nothing_from_the_honest(
    scene: Scene, size: int, wait_for: Callable[..., None]
) -> None:
    """Whole, pinned and open, or opened while the liar is: the cache keeps it, and it is read."""
    data = MADE.randbytes(SIZE)
    path, honest = liar_and_twin(scene, f"bad/thief-{size}", data, size)
    sha256 = hashlib.sha256(data).hexdigest()

    def tier() -> bytes:
        return os.getxattr(honest, "user.helios.tier")

    def here() -> list[Path]:
        return [each for each in (scene.base / "home/cache").rglob(sha256) if each.stat().st_size == SIZE]

    assert scene.read(honest) == data
    wait_for(lambda: tier() == b"l1", 30, what="the honest file to be whole")
    run(scene.mount.home, "pin", f"bad/thief-{size}-twin", "--mount", scene.mount.path)
    wait_for(lambda: scene.mount.metric("helios_mount_open_handles") == 0, 30, what="its handle to go")
    passed = scene.mount.metric("helios_mount_passthrough_opens_total")
    with honest.open("rb") as before:
        kept = here()
        assert kept
        with lied_to(path):
            assert os.pread(before.fileno(), SIZE, 0) == data
            assert scene.read(honest) == data
            assert tier() == b"l1"
        with lied_to(path):
            assert os.pread(before.fileno(), 100, 0) == data[:100]
    with lied_to(path):
        wait_for(lambda: scene.mount.metric("helios_mount_open_handles") == 0, 30, what="its handle to go")
        assert scene.read(honest) == data
    assert here() == kept
    if scene.mount.state["mode"] == "native":
        assert scene.mount.metric("helios_mount_passthrough_opens_total") >= passed + 3
    assert f"gives the blob {sha256} {size} bytes, and it has {SIZE}" in scene.mount.log()


@pytest.mark.usefixtures("good")
@scenes("size", [SIZE - 1, SIZE + 1], [SIZE - 1, SIZE + 1])
def test_a_size_that_is_wrong_may_come_first(scene: Scene, size: int, wait_for: Callable[..., None]) -> None:
    data = MADE.randbytes(SIZE)
    path, honest = liar_and_twin(scene, f"bad/first-{size}", data, size)
    with lied_to(path):
        assert scene.read(honest) == data
        with lied_to(path):
            assert scene.read(honest) == data
        wait_for(lambda: os.getxattr(honest, "user.helios.tier") == b"l1", 30, what="the honest file to be whole")
        assert scene.read(honest) == data
    assert scene.read(honest) == data
