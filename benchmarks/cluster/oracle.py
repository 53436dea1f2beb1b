"""The least that serving everybody at once would cost to who knows the future.

All requests begin when they come, so what is under way at any time is known, and by that how many replicas work, filled
to the last slot. The k-th replica is needed while there are more than k - 1 replicas' requests. It is started so early
that it is ready, from the node's disk, and is kept over a pause that is shorter than a start. No scaler can do better:
requests don't move between workers, so real replicas are never as full.
"""

from __future__ import annotations

import numpy as np

from benchmarks.cluster.nodes import start_s
from benchmarks.cluster.traffic import Stream


def least(stream: Stream, start: float, end: float) -> float:
    """Seconds of replicas of one model from ``start`` to ``end``."""
    first, last = np.searchsorted(stream.at, (start, end))
    at, takes = stream.at[first:last], stream.takes[first:last]
    times = np.concatenate([at, at + takes])
    steps = np.concatenate([np.ones(len(at)), -np.ones(len(at))])
    order = np.lexsort((steps, times))
    times, busy = times[order], np.cumsum(steps[order])
    replicas = np.ceil(busy / stream.model.slots)
    begins_s, total = start_s(stream.model, cached=True), 0.0
    for level in range(1, int(replicas.max(initial=0)) + 1):
        edges = np.diff(np.concatenate([[0], (replicas >= level).astype(int), [0]]))
        ups = times[np.flatnonzero(edges == 1)]
        downs = times[np.minimum(np.flatnonzero(edges == -1), len(times) - 1)]
        pauses = ups[1:] - downs[:-1]
        kept = pauses[pauses < begins_s].sum()
        total += (downs - ups).sum() + kept + begins_s * (1 + np.count_nonzero(pauses >= begins_s))
    return float(total)
