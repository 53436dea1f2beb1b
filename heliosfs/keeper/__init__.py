"""The keeper: the process that holds a native mount, whatever becomes of the one that serves it.

A FUSE mount lives as long as somebody has its /dev/fuse descriptor open, and Linux 6.9 queues again, when it is asked
to (RESEND), what was read from that descriptor and never answered. So this process mounts, holds the descriptor and
serves nothing, while a *worker* (heliosfs/fuse) serves, and may crash, hang, be killed or be upgraded at any time
without an error in any reader. Everything that runs in here is in this directory and imports only Python's standard
library. How to read it, in this order:

    worker     a worker: a process in one of four phases, and after its hello a socket
    place      the place for one worker: how it is taken, watched, and free again
    keeper     the loop: one thread, one poll(2), a deadline for everything; signals and guests
    policy     what counts as hanging, who is to blame for a death, how soon the next worker starts; no I/O
    refuse     EIO, when nobody has served for too long
    __main__   the command line; how a keeper comes by its mount (held), and what it leaves behind: nothing

and where a question stays: board (the page of memory that all workers see), wire and guest (the socket), kernel, log.

The state machine:

    FREE       a spawned process takes the place (after a delay where the last ones failed: policy.Restarts), or with
               ``--external`` a worker's hello; free for ``--patience`` after a worker that served: what waits is EIO
    STARTING   its hello: it gets the descriptor of the mount and the board  ->  it is ready: SERVING
    SERVING    no sign of life for ``--stall``, or a request that is too old: KILLED; so is a start that hangs, or that
               takes so long that what waits has to be EIO (``--patience`` after a worker that served)
    GOING      told to go (SIGHUP, a worker of another name, the end), or hung up: it has the ``--grace``, then KILLED
    KILLED     fenced by the board's generation, and SIGKILL
    -> FREE    its process is gone; or it can't be killed: it is *dropped*, and the next one gets a copy of the board
               (docs/concurrency.md says why that is safe)

    the mount  ends when it is unmounted, at a signal, or when the first spawned worker never served; it *stays* with
               its worker, and the keeper ends, at SIGTERM with ``--external``, once one serves where one is about to;
               when another keeper asks for it, it has the worker bring the mount there, and ends once that one has it,
               else goes on (docs/concurrency.md).
               A worker whose keeper is gone, by this or by SIGKILL, gives the mount to the next one that listens.
"""
