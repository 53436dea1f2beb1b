"""Whether anybody else has a file open: another process, a mapping, or the kernel itself for a mount's passthrough.

A file whose name goes takes room until its last descriptor is closed. Linux grants a write lease (fcntl(2), F_SETLEASE)
only while no other descriptor of the file is open, and in that says what nothing else does. The lease is given back at
once. Who opens the file in that instant waits until then, and the kernel tells us with a signal: SIGURG, which does
nothing unless somebody asked for it, instead of SIGIO, which would end the process.
"""

from __future__ import annotations

import errno
import fcntl
import signal


def open_elsewhere(fd: int) -> bool:
    """Whether the file of a read-only descriptor is open through any other; False where the filesystem can't say."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
