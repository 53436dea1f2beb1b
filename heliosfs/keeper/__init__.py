"""The keeper: the process that holds a native mount, whatever becomes of the one that serves it.

A FUSE mount lives as long as somebody has its /dev/fuse descriptor open, and Linux 6.9 queues again, when it is asked
to (RESEND), what was read from that descriptor and never answered. So this process mounts, holds the descriptor and
serves nothing, while a *worker* (heliosfs/fuse) serves, and may crash, hang, be killed or be upgraded at any time
without an error in any reader. Everything that runs in here is in this directory and imports only Python's standard
library:

    __main__   the command line, and how a keeper comes by its mount
    keeper     the loop: one thread, one poll(2), a deadline for everything
    held       what it holds; taking it over from another keeper, or from the worker that a killed keeper left
    worker     a worker: a process, and after its hello a socket
    policy     how soon the next worker starts, who is to blame for a death, what counts as hanging; no I/O
    board      a page of shared memory: signs of life, and what the next worker must know
    kernel     mount, unmount, and the few FUSE messages that a keeper speaks
    wire       messages on the socket, with descriptors beside them

A worker connects to the socket and says hello; with the answer it gets the descriptor of the mount and the board, once
the process of the last worker is gone. On one machine the keeper spawns its workers. With ``--external`` somebody else
does, a kubelet say: then any worker of an allowed user may come, one that bears another name than the present one
replaces it, and one that hangs and can't be killed from here is *dropped*: its board is fenced, and the next worker
gets a copy (docs/concurrency.md says why that is safe).

While there is no worker, requests wait; after ``--patience`` they fail. A keeper that is to go hands everything to its
successor (``--take-over``); after one that was killed the worker offers the mount to whoever listens at the socket, and
with ``--external`` after one that got SIGTERM. All other ends release the mount: lazy unmount, abort.
"""
