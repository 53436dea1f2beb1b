"""Two network namespaces with a shaped link between them: what a benchmark of remote reads needs, and nothing else.

    server  --- veth, tbf: RATE --->  client
    server  <-- tun, held back for LATENCY ---  client

Data flows down the veth pair, whose rate `tc` holds (tbf). The way up, which carries only requests and
acknowledgements, leads through a pair of tun devices; a small process holds each packet back for the round trip's
latency. It stands in for netem, which not every kernel has; TCP sees a round trip and cannot tell on which way it was
spent.

The namespaces have no names: each lives as long as its process, and that one ends when its standard input does, so
they go with whoever made them, even if that is killed. No other interface is touched. Needs root.

    python -m benchmarks.shaped CLIENT_PID SERVER_PID LATENCY_MS

is the process that holds packets back.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scene import ended

SERVER, CLIENT = "10.231.77.1", "10.231.77.2"
"""Addresses inside the namespaces; nothing outside sees them."""

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
QUEUE = 20000
"""Packets held back at a time; more are dropped, as a full router does."""
SETUP_S = 30.0


@dataclass(frozen=True)
class Link:
    """Prefixes that run a command on either side, and the server's address."""

    server: tuple[str, ...]
    client: tuple[str, ...]
    address: str = SERVER


def _enter(pid: int) -> tuple[str, ...]:
    return ("nsenter", "--net", f"--target={pid}", "--")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SETUP_S)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed: {done.stderr.strip()} (this needs root, iproute2 and util-linux)"
        )


def _namespace(stack: ExitStack) -> int:
    """A network namespace; its process ends with our end of the pipe. Returns the process's pid."""
    command = ["unshare", "--net", "--", "sh", "-c", "echo made; exec cat"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.enter_context(ended(process))
    assert process.stdout is not None
    if process.stdout.readline() != b"made\n":
        raise SystemExit("no network namespace can be made: this needs root")
    return process.pid


@contextmanager
def shaped(mbit: float | None, latency_ms: float) -> Iterator[Link]:
    """The namespaces and their link; ``mbit`` None: as fast as the machine. Latency 0: no tun devices."""
    with ExitStack() as stack:
        server, client = _namespace(stack), _namespace(stack)
        up, down = _enter(server), _enter(client)
        for inside in (up, down):
            for name in ("all", "default"):
                _run(*inside, "sysctl", "-q", "-w", f"net.ipv4.conf.{name}.rp_filter=0")
            _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*up, "ip", "link", "add", "veth", "type", "veth", "peer", "name", "veth", "netns", str(client))
        for inside, address in ((up, SERVER), (down, CLIENT)):
            _run(*inside, "ip", "addr", "add", f"{address}/24", "dev", "veth")
            _run(*inside, "ip", "link", "set", "veth", "up")
        if mbit is not None:
            shape = ["rate", f"{mbit:g}mbit", "burst", "1mb", "latency", "50ms"]
            _run(*up, "tc", "qdisc", "add", "dev", "veth", "root", "tbf", *shape)
        if latency_ms:
            command = [sys.executable, "-m", "benchmarks.shaped", str(client), str(server), str(latency_ms)]
            root = Path(__file__).parent.parent
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
            stack.enter_context(ended(process))
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise SystemExit("the process that holds packets back did not start: this needs /dev/net/tun")
            for inside in (up, down):
                _run(*inside, "ip", "link", "set", "late", "up")
            _run(*down, "ip", "route", "add", f"{SERVER}/32", "dev", "late", "src", CLIENT)
        yield Link(up, down)


def _tun(pid: int) -> int:
    """A tun device named ``late`` in the namespace of a process; returns its descriptor."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"late", _IFF_TUN | _IFF_NO_PI))
    return fd


class Line:
    """Packets on their way, each until it is due. No I/O; times in seconds."""

    def __init__(self, latency_s: float, limit: int = QUEUE) -> None:
        self._latency_s, self._limit = latency_s, limit
        self._packets: deque[tuple[float, bytes]] = deque()
        self.dropped = 0

    def take(self, now: float, packet: bytes) -> None:
        """A packet came."""
        if len(self._packets) >= self._limit:
            self.dropped += 1
            return
        self._packets.append((now + self._latency_s, packet))

    def due(self, now: float) -> Iterator[bytes]:
        """Packets whose time has come, in order."""
        while self._packets and self._packets[0][0] <= now:
            yield self._packets.popleft()[1]

    def wait_s(self, now: float) -> float | None:
        """Seconds until the next one is due; None: there is none."""
        return max(0.0, self._packets[0][0] - now) if self._packets else None


def hold_back(source: int, sink: int, line: Line) -> None:
    """Carry packets from one tun device to the other until standard input ends."""
    while True:
        readable, _, _ = select.select([source, 0], [], [], line.wait_s(time.monotonic()))
        if 0 in readable and not os.read(0, 1):
            return
        if source in readable:
            now = time.monotonic()
            while True:
                try:
                    packet = os.read(source, 65536)
                except BlockingIOError:
                    break
                if packet[0] >> 4 == 4:  # IPv4: what the devices themselves say over IPv6 is left out
                    line.take(now, packet)
        for packet in line.due(time.monotonic()):
            os.write(sink, packet)


def main() -> None:
    client, server, latency = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    source, sink = _tun(client), _tun(server)
    print("ready", flush=True)
    hold_back(source, sink, Line(latency / 1000))


if __name__ == "__main__":
    main()
