"""The operator with the official client against an API server that admits, applies and fails as a real one does."""

from __future__ import annotations

import asyncio
import copy

from tests.support.operators import Site, site
from tests.support.sample_operator import greeting


def scenario(run):
    def test(tmp_path):
        asyncio.run(run(tmp_path))

    test.__name__, test.__doc__ = run.__name__, run.__doc__
    return test


def of(here: Site, plural: str, name: str = "g"):
    """The object as it is, to be changed."""
    (found,) = [one for one in here.server.all(plural) if one["metadata"]["name"] == name]
    return copy.deepcopy(found)


def ready(here: Site, name: str = "g"):
    """Status, message and time of its condition."""
    status = of(here, "greetings", name).get("status") or {"conditions": [{}]}
    (one,) = status["conditions"]
    return one.get("status"), one.get("message")


def events(here: Site):
    return {one["reason"]: one["note"] for one in here.server.all("events")}


@scenario
async def test_what_is_wanted_is_made_and_then_nothing_is_written(tmp_path):
    async with site(tmp_path, resync_s=0.2) as here:
        for number in range(5):
            here.admin("greetings", "create", greeting(f"g{number}", replicas=number))
        here.start()
        await here.converged()
        await asyncio.sleep(0.2)
        assert await here.still(0.6) == {}, "several resyncs"


@scenario
async def test_drift_is_repaired_and_what_others_add_stays(tmp_path):
    async with site(tmp_path) as here:
        here.admin("greetings", "create", greeting("g"))
        here.start()
        await here.converged()
        changed = of(here, "deployments")
        pod = changed["spec"]["template"]["spec"]
        pod["containers"][0]["image"] = "evil:1"
        pod["containers"].append({"name": "sidecar", "image": "mesh:1"})
        changed["metadata"]["labels"]["theirs"] = "yes"
        here.admin("deployments", "update", changed)
        removed = of(here, "configmaps")
        del removed["data"]
        here.admin("configmaps", "update", removed)
        await here.converged()
        after = of(here, "deployments")
        assert after["metadata"]["labels"]["theirs"] == "yes"
        assert [one["name"] for one in after["spec"]["template"]["spec"]["containers"]] == ["main", "sidecar"]
        here.remove("deployments", "g")
        await here.converged()
        await asyncio.sleep(0.1)
        assert await here.still(0.3) == {}


@scenario
async def test_a_field_that_is_wanted_no_more_is_removed(tmp_path):
    async with site(tmp_path) as here:
        made = here.admin("greetings", "create", greeting("g", replicas=2))
        here.start()
        await here.converged()
        wanted = of(here, "greetings")
        wanted["spec"] |= {"deploy": False, "replicas": 1}
        here.admin("greetings", "update", wanted)
        await here.converged()
        assert here.server.all("deployments") == []
        assert of(here, "greetings")["metadata"]["uid"] == made["metadata"]["uid"]


@scenario
async def test_another_operator_finds_all_as_it_should_be(tmp_path):
    async with site(tmp_path) as here:
        for number in range(3):
            here.admin("greetings", "create", greeting(f"g{number}"))
        first = here.start()
        await here.converged()
        await here.kill(first)
        made = here.server.cluster.made.copy()
        second = here.start()
        await here.until(lambda: second.leadership.remaining_s() > 0)
        await asyncio.sleep(0.3)
        changed = here.server.cluster.made - made
        assert {key for key in changed if key[0] != "Lease"} == set(), "nothing was changed"
        assert await here.still(0.3) == {}


@scenario
async def test_deletion_leaves_nothing(tmp_path):
    async with site(tmp_path) as here:
        here.admin("greetings", "create", greeting("g"))
        here.start()
        await here.converged()
        here.remove("greetings", "g")
        await here.until(lambda: not here.server.all("greetings"))
        await here.until(lambda: not here.wrong(), why=here.wrong)


@scenario
async def test_what_somebody_else_owns_is_not_touched(tmp_path):
    async with site(tmp_path) as here:
        theirs = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "g", "namespace": "ns"},
            "data": {"a": "b"},
        }
        before = here.admin("configmaps", "create", theirs)
        here.admin("greetings", "create", greeting("g"))
        here.start()
        await here.until(lambda: ready(here) == ("False", "NotOwned of ConfigMap"))
        await asyncio.sleep(0.3)
        assert of(here, "configmaps") == before
        here.remove("configmaps", "g")
        await here.converged()
        await here.until(lambda: ready(here) == ("True", ""))


@scenario
async def test_a_quota_is_a_condition_and_an_event_and_others_go_on(tmp_path):
    async with site(tmp_path) as here:
        here.server.cluster.quotas["ns", "deployments.apps"] = 1
        for name in ("a", "b"):
            here.admin("greetings", "create", greeting(name))
        here.start()
        failed = ("False", "QuotaExceeded of Deployment")
        await here.until(lambda: sorted([ready(here, "a"), ready(here, "b")], key=str) == [failed, ("True", "")])
        await here.until(lambda: events(here).get("Failed") == "QuotaExceeded of Deployment")
        await asyncio.sleep(0.5)
        assert len(here.server.all("events")) == 1, "it is tried again, and said once"
        del here.server.cluster.quotas["ns", "deployments.apps"]
        await here.converged()
        await here.until(lambda: (ready(here, "a"), ready(here, "b")) == (("True", ""),) * 2)


@scenario
async def test_an_invalid_object_is_a_condition_that_names_it(tmp_path):
    async with site(tmp_path) as here:
        here.admin("greetings", "create", greeting("g"))
        here.server.faults.add(lambda call: call.kind == "Deployment" and call.write, status=422, times=None)
        here.start()
        await here.until(lambda: ready(here) == ("False", "Invalid of Deployment"))
        here.server.faults.planned.clear()
        await here.converged()
        await here.until(lambda: ready(here) == ("True", ""))


@scenario
async def test_too_many_requests_are_answered_by_waiting_as_asked(tmp_path):
    async with site(tmp_path) as here:
        here.admin("greetings", "create", greeting("g"))
        here.server.calls = []
        fault = here.server.faults.add(lambda call: call.kind == "ConfigMap" and call.write, status=429, retry_after=1)
        here.start()
        await here.until(lambda: fault.met == 1)
        assert [call for call in (await still_calls(here, 0.6)) if call.kind == "ConfigMap" and call.write] == []
        await here.converged()


async def still_calls(here: Site, seconds: float):
    """The calls that come within a time."""
    before = len(here.server.calls)
    await asyncio.sleep(seconds)
    return here.server.calls[before:]


def test_a_broken_reconciler_fails_for_one_object_only(tmp_path, expected_log_errors):
    expected_log_errors("a reconciler failed")
    asyncio.run(one_is_broken(tmp_path))


async def one_is_broken(tmp_path):
    async with site(tmp_path) as here:
        sound = here.reconciler.reconcile

        def reconcile(observed):
            if observed.ref.name == "bad":
                raise ZeroDivisionError
            return sound(observed)

        here.reconciler.reconcile = reconcile
        here.admin("greetings", "create", greeting("bad"))
        here.admin("greetings", "create", greeting("good"))
        operator = here.start()
        await here.until(lambda: ready(here, "good") == ("True", ""))
        turns = operator._metrics.turns.labels("Greeting", "broken")._value
        await here.until(lambda: turns.get() > 2)


@scenario
async def test_a_kind_that_is_not_installed_is_waited_for(tmp_path):
    async with site(tmp_path) as here:
        here.remove("customresourcedefinitions", "greetings.tests.helios.dev", "")
        operator = here.start()
        await here.until(lambda: not operator.unready)
        assert not operator.controller.cache.served(here.reconciler.kind)
        assert not operator.unlive


@scenario
async def test_health_says_what_is_missing(tmp_path):
    async with site(tmp_path) as here:
        here.server.faults.add(lambda call: call.kind == "ConfigMap" and call.verb == "list", status=403, times=None)
        operator = here.start()
        await here.until(lambda: operator.unready == "not listed yet: configmaps")
        here.admin("greetings", "create", greeting("g"))
        await asyncio.sleep(0.2)
        assert here.server.writes.total() == 0, "nothing is decided on half of the truth"
        here.server.faults.planned.clear()
        await here.converged()


@scenario
async def test_a_lease_is_given_back_at_the_end_and_the_next_one_leads_at_once(tmp_path):
    async with site(tmp_path, lease_s=60.0, renew_s=40.0, retry_s=0.05) as here:
        here.admin("greetings", "create", greeting("g"))
        first, second = here.start(), here.start()
        await here.converged()
        leader = first if first.leadership.remaining_s() > 0 else second
        other = second if leader is first else first
        task = next(task for one, task in here.running if one is leader)
        here.running.remove((leader, task))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await here.until(lambda: other.leadership.remaining_s() > 0, 5)


@scenario
async def test_somebody_who_insists_is_told_of_and_not_fought_without_end(tmp_path):
    async with site(tmp_path) as here:
        here.admin("greetings", "create", greeting("g"))
        here.start()
        await here.converged()

        def insists(call):
            if call.verb == "apply" and call.kind == "ConfigMap":
                asyncio.get_running_loop().call_later(0.01, change)

        def change():
            here.admin("configmaps", "update", of(here, "configmaps") | {"data": {"text": "theirs"}})

        here.server.performing = insists
        change()
        await here.until(lambda: ready(here) == ("False", "Contested of ConfigMap"))
        before = here.server.asked["ConfigMap", "apply"]
        await asyncio.sleep(0.5)
        assert here.server.asked["ConfigMap", "apply"] == before <= 1 + 5
