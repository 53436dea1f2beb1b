"""Who scales 100 models on 50 nodes for a week, and what that costs whom, in virtual time (benchmarks/cluster).

Beside each other, on the same seeded traffic: Kubernetes' autoscaler alone, KubeAI's moving average, Helios' own policy
(orchestrator/scaling, the code that the operator runs) without and with its forecast, and the least that serving
everybody at once would cost to who knows the future. All aim at the same requests per replica. Forecasts have seen
three weeks before.

Reported, summed over seeds: hours of replicas and of GPUs; requests hit by a cold start (they waited for more than a
second, and a replica of their model was starting meanwhile); requests that waited for more than 5 s; the p99 of
waiting; how many replicas were started; with the forecast, both beside the same without it, and what any rule could
reach that knows all rates but not when requests come (``cluster/bound``; ``diurnal`` and ``tail``).

    python -m benchmarks.autoscaling [--traces diurnal bursty flash tail] [--seeds 11 12] [--days 7] [--rate 3]
        [--worth S] [--json FILE]

Target: on ``diurnal`` the forecast spares 80% of the requests that were hit, for at most 15% more hours of replicas.
``worth_s`` and everything else were chosen on seeds 1 and 2; the seeds here were not looked at before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import plots
from benchmarks.cluster.bound import fewest
from benchmarks.cluster.oracle import least
from benchmarks.cluster.scalers import MOST, TARGET, Helios, Hpa, KubeAi, learnt
from benchmarks.cluster.site import Scaler, Site
from benchmarks.cluster.traffic import DAY, KINDS, WEEK, Stream, planned, traffic
from benchmarks.common import save
from orchestrator.scaling.settings import ForecastSettings, ScalingSettings

HISTORY: Final = 3
"""Weeks before those that are simulated."""
SLOTS: Final = 8
POISSON: Final = ("diurnal", "tail")
"""Traces whose requests come by chance at a rate, and not because others did."""
MORE: Final = 0.15
"""More hours of replicas than without a forecast that the target allows."""
HPA, KUBEAI, REACTIVE, FORECAST, ORACLE = "HPA", "KubeAI", "Helios, reactive", "Helios, forecast", "oracle"


def settings(mode: Any, worth_s: float) -> ScalingSettings:
    """The defaults, but for what the simulated workers are like, and a look every 30 s, which takes half the time."""
    return ScalingSettings(
        in_flight_per_replica=TARGET * SLOTS, kv_usage=0.0, max_replicas=MOST, interval_s=30.0, startup_s=60.0,
        forecast=ForecastSettings(mode=mode, worth_s=worth_s),
    )  # fmt: skip


def scaler(name: str, streams: list[Stream], worth_s: float) -> Scaler:
    if name == HPA:
        return Hpa()
    if name == KUBEAI:
        return KubeAi()
    if name == REACTIVE:
        return Helios(settings("off", worth_s))
    chosen = settings("act", worth_s)
    return Helios(chosen, learnt(streams, chosen, HISTORY))


def row(site: Site) -> dict[str, float]:
    waits = np.zeros(site.requests)
    waits[: len(site.waits)] = site.waits
    return {
        "replica_hours": site.replica_s / 3600, "gpu_hours": site.gpu_s / 3600, "requests": site.requests,
        "hit": site.hit, "missed": site.missed, "p99_wait_s": float(np.quantile(waits, 0.99)), "starts": site.starts,
        "fetched_tb": site.nodes.fetched / 1e12,
    }  # fmt: skip


def measured(trace: str, seeds: Sequence[int], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What each cost on one trace: the sum over seeds, of waits the mean."""
    start, end = HISTORY * WEEK, HISTORY * WEEK + args.days * DAY
    sums: dict[str, dict[str, float]] = {}
    for seed in seeds:
        weeks = HISTORY + max(1, round(args.days / 7))
        streams = traffic(trace, seed, weeks, args.models, args.rate)
        rows = {}
        for name in (HPA, KUBEAI, REACTIVE, FORECAST):
            site = Site(streams, args.nodes, start, end)
            site.run(scaler(name, streams, args.worth))
            rows[name] = row(site)
        costs = [(least(stream, start, end), stream.model.gpus) for stream in streams]
        rows[ORACLE] = {
            "replica_hours": sum(cost for cost, _ in costs) / 3600,
            "gpu_hours": sum(cost * gpus for cost, gpus in costs) / 3600,
        }
        if trace in POISSON:
            plan, plain = planned(trace, seed, weeks, args.models, args.rate), settings("off", args.worth)
            hold_s = plain.idle_s + plain.interval_s / 2  # somebody looks for the last time during a request
            more_s = MORE * rows[REACTIVE]["replica_hours"] * 3600
            rows[REACTIVE] |= fewest(plan, start, end, hold_s, more_s)._asdict()
        for name, values in rows.items():
            into = sums.setdefault(name, {})
            for key, value in values.items():
                into[key] = into.get(key, 0.0) + value / (len(seeds) if key == "p99_wait_s" else 1)
    return sums


def table(trace: str, rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Print a trace's rows; what the forecast is beside the reactive policy."""
    print(f"\n{trace}: {rows[HPA]['requests']:,.0f} requests")
    print(
        f"{'':18}{'replica h':>10}{'GPU h':>9}{'hit':>8}{'%':>7}{'> 5 s':>8}{'p99 wait':>10}{'starts':>8}{'fetched':>9}"
    )
    for name, one in rows.items():
        line = f"{name:18}{one['replica_hours']:10,.0f}{one['gpu_hours']:9,.0f}"
        if "hit" in one:
            line += (
                f"{one['hit']:8,.0f}{one['hit'] / one['requests']:7.2%}{one['missed']:8,.0f}{one['p99_wait_s']:8.1f} s"
            )
            line += f"{one['starts']:8,.0f}{one['fetched_tb']:6.1f} TB"
        print(line)
    before, after = rows[REACTIVE], rows[FORECAST]
    ratios = {
        "spared": 1 - after["hit"] / max(1.0, before["hit"]),
        "hours": after["replica_hours"] / before["replica_hours"],
    }
    print(f"the forecast spares {ratios['spared']:.1%} of the hit, for {ratios['hours'] - 1:+.1%} hours", flush=True)
    if "fewest" in before:
        ratios["most_spared"] = 1 - before["fewest"] / before["reactive"]
        print(f"who knows all rates, but not when requests come, {ratios['most_spared']:.1%} for {MORE:+.0%} at most")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="Scalers beside each other, in virtual time.")
    parser.add_argument("--traces", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12])
    parser.add_argument("--days", type=float, default=7.0, help="simulated days (7)")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second of all models together (3)")
    parser.add_argument("--worth", type=float, default=ForecastSettings().worth_s, help="worth_s of the forecast")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    args = parser.parse_args()
    began = time.process_time()
    rows = {trace: measured(trace, args.seeds, args) for trace in args.traces}
    ratios = {trace: table(trace, found) for trace, found in rows.items()}
    used = time.process_time() - began
    print(f"\nCPU {used:.0f} s")
    result = {
        "benchmark": "autoscaling", "time": int(time.time()), "seeds": args.seeds, "days": args.days, "rate": args.rate,
        "worth_s": args.worth, "rows": rows, "ratios": ratios, "cpu_s": used,
    }  # fmt: skip
    out = save(result, args.json)
    bars = {f"{trace}, {name}": {"%": 100 * one["hit"] / one["requests"]} for trace, found in rows.items()
            for name, one in found.items() if "hit" in one}  # fmt: skip
    out.with_suffix(".svg").write_text(plots.bars("Requests hit by a cold start", "%", bars))
    print(out)


if __name__ == "__main__":
    main()
