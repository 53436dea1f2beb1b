"""Publishing volumes on this node: pinned in the mount, then bound read-only where the kubelet wants them.

No record is kept beside the mount's volumes and the kernel's table of mounts. Volumes belong to the driver if their id
in the mount has its prefix, and one that nothing in the table shows is nobody's: the sweep deletes it. Per target one
operation goes on at a time, another one is told so; per volume one changes it, others wait for it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from csi import attributes, targets
from csi.attributes import PREFIX, Wanted
from csi.binding import bind
from csi.calls import Calls
from csi.errors import Precondition
from csi.health import Health
from csi.mounted import MountOfNode, forget, look
from csi.pending import Locks, Targets
from csi.targets import Published
from csi.until import Until
from helios import mounts
from helios.errors import Conflict, DeadlineExceeded, HeliosError, NoSpace, NotFound, Unavailable

log = logging.getLogger("csi.node")

T = TypeVar("T")

QUICK_S: Final = 10.0
"""Longest wait for what only looks at tables and local directories, in seconds."""
UNDO_S: Final = 5.0
"""Longest wait for the mount when a failed publish is undone, in seconds; what isn't by then the sweep does."""
FORGET_S: Final = 2.0
"""Longest wait for the mount when a volume is unpublished, in seconds: pods end whether it answers or not."""
SETTLED_S: Final = 300.0
"""A volume that nothing shows is deleted when it is older, in seconds: longer than any publish takes."""
RECOVER_S: Final = (0.1, 5.0)
"""First and longest pause before a mount that did not answer is asked again, at the start, in seconds."""


class Volumes:
    """The volumes of this node. Called on one event loop."""

    def __init__(self, mount: MountOfNode, calls: Calls, kubelet: Path) -> None:
        self._mount, self._calls, self._kubelet = mount, calls, kubelet
        self._base = mounts.canonical(kubelet)
        self._targets, self._locks = Targets(), Locks()
        self._usages: dict[str, tuple[int, int]] = {}

    # --- publish ---

    async def publish(
        self, volume: str, wanted: Wanted, target_path: str, options: frozenset[str], until: Until
    ) -> None:
        """Have the volume at the target. Nothing is left of it when that fails.

        Raises what the mount and the registry say; Pending, Precondition, Conflict, DeadlineExceeded, Unavailable.
        """
        target = await self._place(target_path, until)
        with self._targets.operation(str(target), "the operation on"):
            async with self._locks.holding(volume, until.left):
                at = _at(target)
                if at is not None and (at.volume, at.form) != (PREFIX + volume, wanted.form):
                    raise Conflict(
                        f"{target} shows {_name(at)}, not {volume} as {attributes.name_of(wanted.form)}",
                        hint="Unpublish that first.",
                    )
                try:
                    await self._publish(volume, wanted, target, at, options, until)
                except BaseException:
                    await self._undo(volume)
                    raise

    async def _publish(
        self,
        volume: str,
        wanted: Wanted,
        target: Path,
        at: Published | None,
        options: frozenset[str],
        until: Until,
    ) -> None:
        inside = PREFIX + volume
        await self._make(inside, wanted, until)
        given_up = threading.Event()

        def show() -> None:
            mountpoint, entry = self._mount.root()
            if at is not None and at.device == entry.device:
                look(target, 0.9 * until.left)
                return
            source = mountpoint / ".volumes" / inside / wanted.form
            look(source, 0.9 * until.left)
            if at is not None and not given_up.is_set():
                log.warning("a mount that nobody serves is replaced", extra={"volume": volume, "target": str(target)})
                _detach_all(target)
            made = _make_directory(target)
            try:
                bind(source, target, options, lambda: not given_up.is_set())
            except BaseException:
                if made:
                    _remove_directory(target)
                raise

        try:
            await self._run(f"mounting {inside} at {target}", show, until)
        except BaseException:
            given_up.set()
            raise
        log.info("published", extra={"volume": volume, "repo": str(wanted.repo), "target": str(target)})
        if wanted.prefetch is not None:
            await self._prefetch(inside, wanted, until)

    async def _make(self, inside: str, wanted: Wanted, until: Until) -> None:
        """Have the mount's volume. One that nothing shows any more may have been another, and is replaced."""
        body = {"repo": str(wanted.repo), "revision": wanted.revision}
        body |= {} if wanted.commit is None else {"commit": wanted.commit}
        body |= {} if wanted.priority is None else {"priority": wanted.priority}

        def put() -> None:
            self._mount.call("PUT", f"volumes/{inside}", body, timeout_s=0.9 * until.left)

        try:
            await self._run(f"making the volume {inside}", put, until)
        except Conflict:
            if self._shown(inside):
                raise
            log.warning("a volume of which nothing was left is made anew", extra={"volume": inside})
            await self._run(f"replacing the volume {inside}", lambda: self._delete(inside, until), until)
            await self._run(f"making the volume {inside}", put, until)

    async def _prefetch(self, inside: str, wanted: Wanted, until: Until) -> None:
        """Have the mount begin to fetch its files. That it can't keeps nobody from reading them."""

        def warm() -> None:
            commit = self._mount.call("GET", f"volumes/{inside}", timeout_s=until.left)["commit"]
            body: dict[str, Any] = {"repo": str(wanted.repo), "revision": commit}
            body |= {"patterns": list(wanted.prefetch)} if wanted.prefetch else {}
            self._mount.call("POST", "warm", body, timeout_s=until.left)

        try:
            await self._run(f"prefetching {inside}", warm, until)
        except HeliosError as error:
            log.warning("a volume can't be prefetched", extra={"volume": inside, "reason": error.message})

    async def _undo(self, volume: str) -> None:
        """Let go of a volume that could not be published, unless other pods have it."""
        inside = PREFIX + volume
        try:
            if not self._shown(inside):
                await self._forget(inside, UNDO_S)
        except HeliosError as error:
            log.warning("what a publish left is not undone yet", extra={"volume": volume, "reason": error.message})

    # --- unpublish ---

    async def unpublish(self, volume: str, target_path: str, until: Until) -> None:
        """Have nothing at the target, whatever became of what was mounted there. Raises NotFound for another volume."""
        target = await self._place(target_path, until)
        with self._targets.operation(str(target), "the operation on"):
            async with self._locks.holding(volume, until.left):
                at = _at(target)
                if at is not None and at.volume != PREFIX + volume:
                    raise NotFound(f"{target} shows {_name(at)}, not {volume}")

                def hide() -> None:
                    _detach_all(target)
                    _remove_directory(target)

                await self._quick(f"unmounting {target}", hide, until)
                inside = PREFIX + volume
                if self._shown(inside):
                    return
                gone = await self._forget(inside, FORGET_S)
                log.info("unpublished", extra={"volume": volume, "target": str(target), "forgotten": gone})

    # --- what there is ---

    async def usage(self, volume: str, volume_path: str, until: Until) -> tuple[int, int, str]:
        """Bytes and inodes of a published volume, and what is wrong with it ("" where nothing is). Raises NotFound."""
        try:
            target = await self._place(volume_path, until)
        except HeliosError:
            raise NotFound(f"the volume {volume} is not published at {volume_path[:150]!r}") from None
        at = _at(target)
        if at is None or at.volume != PREFIX + volume:
            raise NotFound(f"the volume {volume} is not published at {target}")
        size, files, wrong = *self._usages.get(volume, (0, 0)), ""
        try:
            found = await self._run(
                f"asking about {volume}",
                lambda: self._mount.call("GET", f"volumes/{at.volume}/usage", timeout_s=min(3.0, until.left)),
                until,
            )
            size, files = found["bytes"], found["files"] + found["directories"]
            self._usages[volume] = size, files
            _, entry = await self._quick("looking for the mount", self._mount.root, until)
            if entry.device != at.device:
                wrong = "the filesystem was mounted anew, and this pod still has the old one: start the pod again"
            else:
                await self._calls.run(f"looking at {target}", lambda: look(target, 0.0), min(3.0, until.left))
        except HeliosError as error:
            wrong = error.message
        return size, files, wrong

    async def sweep(self) -> list[str]:
        """Delete the mount's volumes that belong to the driver and that nothing shows; returns their ids there.

        Raises HeliosError when the mount does not answer.
        """
        found = await self._calls.run("sweeping", lambda: self._mount.call("GET", "volumes", timeout_s=QUICK_S), 15.0)
        ours = {record["id"]: record["created"] for record in found["volumes"] if record["id"].startswith(PREFIX)}
        self._usages = {volume: usage for volume, usage in self._usages.items() if PREFIX + volume in ours}
        gone = []
        for inside, created in ours.items():
            volume = inside.removeprefix(PREFIX)
            if time.time() - created < SETTLED_S or self._locks.busy(volume):
                continue
            async with self._locks.holding(volume, QUICK_S):
                if not self._shown(inside) and await self._forget(inside, UNDO_S):
                    gone.append(inside)
        return gone

    # --- looking ---

    async def shows(self, volume: str, target_path: str, until: Until) -> bool:
        """Whether the volume is published there, whether it can be read or not. Raises as ``publish`` does."""
        at = _at(await self._place(target_path, until))
        return at is not None and at.volume == PREFIX + volume

    def places(self) -> int:
        """In how many places below the kubelet's directory volumes are shown."""
        return len(targets.published(mounts.mount_table(), self._base))

    async def _place(self, path: str, until: Until) -> Path:
        return await self._quick("looking up the target", lambda: targets.check_target(path, self._kubelet), until)

    def _shown(self, inside: str) -> bool:
        """Whether the volume is bound anywhere below the kubelet's directory."""
        table = targets.published(mounts.mount_table(), self._base)
        return any(each.volume == inside for each in table)

    async def _forget(self, inside: str, timeout_s: float) -> bool:
        return await self._calls.run(
            f"forgetting {inside}", lambda: forget(self._mount, inside, timeout_s), timeout_s + 1
        )

    def _delete(self, inside: str, until: Until) -> None:
        self._mount.call("DELETE", f"volumes/{inside}", timeout_s=until.left)

    async def _run(self, what: str, function: Callable[[], T], until: Until) -> T:
        if not until.left:
            raise DeadlineExceeded(f"no time was left for {what}")
        return await self._calls.run(what, function, until.left)

    async def _quick(self, what: str, function: Callable[[], T], until: Until) -> T:
        return await self._calls.run(what, function, max(0.5, min(QUICK_S, until.left)))


async def recover(volumes: Volumes, health: Health) -> None:
    """Clear away what an earlier process left, as soon as the mount answers; then the driver is ready."""
    pause, said = RECOVER_S[0], ""
    while True:
        try:
            gone = await volumes.sweep()
        except HeliosError as error:
            if error.message != said:
                log.info("not ready yet", extra={"reason": error.message})
            said = error.message
            health.waits(said)
            await asyncio.sleep(pause)
            pause = min(RECOVER_S[1], 2 * pause)
            continue
        log.info("ready", extra={"cleared": gone})
        health.recovered()
        return


async def keep_swept(volumes: Volumes, swept: Callable[[int], None], every_s: float = 60.0) -> None:
    """Sweep for ever; ``swept`` is told how many volumes went."""
    while True:
        await asyncio.sleep(every_s)
        try:
            if gone := await volumes.sweep():
                log.info("volumes that nothing shows are deleted", extra={"volumes": gone})
                swept(len(gone))
        except HeliosError as error:
            log.info("volumes can't be swept now", extra={"reason": error.message})


def _at(target: Path) -> Published | None:
    """What is mounted at the target. The kernel's table is read without touching what is mounted, so it never hangs.

    Raises Precondition for what is not ours.
    """
    entry = mounts.find_mount(target)
    if entry is None:
        return None
    if found := targets.published([entry], target):
        return found[0]
    raise Precondition(
        f"{target} is a mount point of {entry.fstype} ({entry.source}), and no volume of this driver",
        hint="Unmount it on the node.",
    )


def _make_directory(target: Path) -> bool:
    """Make the directory unless it is there; says whether it was made. Raises Precondition, NoSpace, Unavailable."""
    try:
        target.mkdir(mode=0o750)
        return True
    except FileExistsError:
        pass
    except OSError as error:
        problem = f"{target} can't be made: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(problem, hint="Make room on the disk with the kubelet's directory.") from None
        raise Unavailable(problem) from None
    if not stat.S_ISDIR(target.lstat().st_mode):
        raise Precondition(f"{target} is there and no directory", hint="Remove it on the node.")
    if os.listdir(target):
        raise Precondition(f"{target} is not empty; what is in it would be hidden", hint="Empty it on the node.")
    return False


def _remove_directory(target: Path) -> None:
    """Remove the empty directory, if it is there. Raises Precondition."""
    try:
        target.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise Precondition(
            f"{target} can't be removed: {error.strerror}", hint="Look at what is in it on the node, and remove it."
        ) from None


def _detach_all(target: Path) -> None:
    """Unmount what of ours is there, one on another. Raises Unavailable."""
    while (entry := mounts.find_mount(target)) is not None and targets.published([entry], target):
        mounts.detach(target)


def _name(at: Published) -> str:
    return f"{at.volume.removeprefix(PREFIX)} as {attributes.name_of(at.form)}"
