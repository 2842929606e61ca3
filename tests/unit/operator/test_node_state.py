"""What nodes say, and what follows for the pods on them: lost ones are given up, leaving ones are left."""

from datetime import timedelta
from typing import Any

import pytest

from diffusion_api.outcomes import Cause
from diffusion_operator.cache import PodCache
from diffusion_operator.node_state import DEPARTURES, LOST_AFTER, MAX_GONE, QUIET, NodeState, NodeStates, read
from diffusion_operator.policies.evidence import ending_of
from diffusion_operator.state import SeenPod
from testkit.builders import NOW, Object, at, deleting, disrupted, last_word, make_job, make_node, make_pod, terminated
from testkit.deciding import after, ask, condition, ended, running

LATER = LOST_AFTER.total_seconds()
SPOT = "aws-node-termination-handler/spot-itn"
UNREACHABLE = "node.kubernetes.io/unreachable"


def silent(name: str = "n1", *, since: float = 0, effect: str = "NoExecute", ready: str = "Unknown") -> Object:
    return make_node(name, f"{UNREACHABLE}:{effect}", ready=ready, taint_added=since)


def on(node: Object | None, pod: Object, *, gone: bool = False) -> SeenPod:
    """Return the pod as it is seen with its node as it is; None: the node is gone."""
    states = NodeStates()
    if node is None:
        states.remove(make_node("n1"))
    else:
        states.put(node)
    return SeenPod(pod, gone=gone, node_state=states.of("n1"))


def test_a_well_node_says_nothing() -> None:
    assert read(make_node("n1", "nvidia.com/gpu=present:NoSchedule")) is QUIET
    assert not QUIET.is_lost(NOW)


@pytest.mark.parametrize(
    "node",
    [
        silent(effect="NoSchedule"),
        silent(ready="True"),
        make_node("n1", ready="Unknown"),
        make_node("n1", "node.kubernetes.io/not-ready:NoExecute", ready="False"),
    ],
    ids=["not judged yet", "back already", "no taint", "its kubelet still speaks"],
)
def test_a_node_that_may_be_well_is_not_lost(node: Object) -> None:
    assert not read(node).is_lost(NOW + timedelta(days=1))


def test_a_silent_node_is_waited_for_a_moment() -> None:
    state = read(silent(since=0))
    assert [state.is_lost(NOW + timedelta(seconds=s)) for s in (0, LATER - 1, LATER)] == [False, False, True]
    assert state.seconds_to_lost(NOW + timedelta(seconds=4)) == LATER - 4


@pytest.mark.parametrize("key", ["node.kubernetes.io/out-of-service", "node.cloudprovider.kubernetes.io/shutdown"])
def test_who_knows_that_nothing_runs_there_is_believed_at_once(key: str) -> None:
    assert read(make_node("n1", f"{key}:NoExecute")).is_lost(NOW)


def test_news_is_what_differs() -> None:
    states = NodeStates()
    assert not states.put(make_node("n1")), "that it is well is no news"
    assert states.put(silent())
    assert not states.put(silent())
    assert states.put(make_node("n1"))
    assert states.remove(make_node("n1"))
    assert not states.remove(make_node("n1"))
    assert states.of("n1").is_lost(NOW)
    assert states.put(make_node("n1")), "a node of that name is back"
    assert states.of("n1") == QUIET == states.of("n2")


def test_of_nodes_that_are_gone_only_so_many_are_remembered() -> None:
    states = NodeStates()
    for number in range(MAX_GONE + 1):
        states.remove(make_node(f"n{number}"))
    assert states.of("n0") == QUIET
    assert states.of("n1").lost


def test_a_node_that_goes_takes_its_notice_along() -> None:
    states = NodeStates()
    states.put(make_node("n1", f"{SPOT}:NoSchedule"))
    states.remove(make_node("n1"))
    assert (states.of("n1").lost, states.of("n1").leaving) == ("is gone", f"{DEPARTURES[SPOT].meaning} (taint {SPOT})")


def test_pods_know_their_node() -> None:
    job, pods = make_job(), PodCache()
    pods.put(make_pod(job, node="n1"))
    pods.nodes.put(silent())
    (seen,) = pods.of_job(job["metadata"]["uid"])
    assert seen.node_state == read(silent())
    assert pods.owners_on("n1") == {job["metadata"]["uid"]}
    assert pods.owners_on("n2") == set()


def cause(pod: SeenPod, seconds: float = LATER) -> tuple[Cause, str]:
    found = ending_of((pod,), stopped=False, now=NOW + timedelta(seconds=seconds))
    return found.cause, found.message


def test_a_pod_of_a_lost_node_is_given_up_whatever_its_object_says() -> None:
    pod = make_pod(make_job(), phase="Running", node="n1")
    assert cause(on(silent(), pod)) == (
        Cause.NODE_LOST,
        f"the node stopped answering or is gone (node n1 does not answer (taint {UNREACHABLE}, Ready Unknown))",
    )
    assert cause(on(None, pod, gone=True))[0] == Cause.NODE_LOST
    assert on(silent(), pod).live(NOW)
    assert not on(silent(), pod).live(NOW + LOST_AFTER)


def pod_that(status: dict[str, Any], **metadata: Any) -> Object:
    return make_pod(make_job(), phase="Failed", node="n1", status=status, metadata=metadata)


@pytest.mark.parametrize(
    ("pod", "gone", "expected"),
    [
        (pod_that(terminated(0)), False, Cause.COMPLETED),
        (pod_that(terminated(64, message=last_word(64))), False, Cause.BAD_CONFIG),
        (pod_that(disrupted("EvictionByEvictionAPI") | {"phase": "Running"}, **deleting()), True, Cause.PREEMPTED),
        (pod_that(disrupted("DeletionByPodGC") | {"phase": "Running"}, **deleting()), True, Cause.NODE_LOST),
    ],
    ids=["completed before", "ended by itself before", "drained before", "cleaned up after"],
)
def test_what_was_before_the_node_was_lost_counts(pod: Object, gone: bool, expected: Cause) -> None:
    assert cause(on(None, pod, gone=gone))[0] == expected


def test_killed_as_its_node_goes_is_no_crash() -> None:
    leaving = make_node("n1", f"{SPOT}:NoSchedule")
    assert cause(on(leaving, pod_that(terminated(137))))[0] == Cause.PREEMPTED
    assert cause(on(make_node("n1"), pod_that(terminated(137))))[0] == Cause.CRASH
    assert cause(on(leaving, pod_that(terminated(137, reason="OOMKilled"))))[0] == Cause.HOST_OUT_OF_MEMORY
    assert cause(on(leaving, pod_that(terminated(1, message=last_word(1)))))[0] == Cause.CRASH


def test_an_eviction_says_what_the_node_said() -> None:
    pod = pod_that(disrupted("EvictionByEvictionAPI"), **deleting())
    said = cause(on(make_node("n1", "karpenter.sh/disrupted:NoSchedule"), pod))
    assert said[0] == Cause.PREEMPTED
    assert "EvictionByEvictionAPI" in said[1]
    assert "node n1: Karpenter replaces or removes it (taint karpenter.sh/disrupted)" in said[1]


def test_the_next_attempt_does_not_wait_for_a_lost_node() -> None:
    job, pod = running()
    waits = ask(job, on(silent(), pod), seconds=4)
    assert (waits.delete, waits.create, waits.again_seconds) == ((), (), LATER - 4)
    decision = ask(job, on(silent(), pod), seconds=LATER)
    assert decision.status is not None
    newest, ended_ = decision.status.attempts
    assert (newest.number, ended_.cause, decision.status.counters.failures) == (2, "NodeLost", 0)
    assert [manifest["metadata"]["name"] for manifest in decision.create] == ["cats-2-0"]
    job = after(job, decision)
    again = ask(job, on(silent(), pod), seconds=LATER)
    assert [manifest["metadata"]["name"] for manifest in again.create] == ["cats-2-0"]
    then = ask(job, on(silent(), pod), make_pod(job, attempt=2), seconds=LATER)
    assert [found.name for found in then.delete] == ["cats-1-0"], "so that it ends when its node comes back"


@pytest.mark.parametrize("key", [key for key, departure in DEPARTURES.items() if departure.final])
def test_a_leaving_node_is_left_at_once(key: str) -> None:
    job, pod = running()
    leaving = make_node("n1", f"{key}:NoSchedule")
    decision = ask(job, on(leaving, pod))
    assert decision.rule == "departure"
    assert [found.name for found in decision.delete] == ["cats-1-0"]
    assert condition(decision, "Progressing") == ("False", "Preempted")
    job = after(job, decision)
    told = ended(job, terminated(75, message=last_word(75, step=70), finished=3), **deleting(asked=1))
    for node in (leaving, make_node("n1"), None):  # whatever the node says by now
        over = ask(job, on(node, told), seconds=5)
        assert over.status is not None
        assert (over.status.attempt, over.status.attempts[1].cause) == (2, "Preempted")
        assert key in over.status.attempts[1].message
        assert (over.status.counters.failures, over.status.counters.preemptions) == (0, 1)
        assert [manifest["metadata"]["name"] for manifest in over.create] == ["cats-2-0"]


@pytest.mark.parametrize("key", [key for key, departure in DEPARTURES.items() if not departure.final])
def test_a_node_that_may_yet_stay_is_not_left(key: str) -> None:
    job, pod = running()
    assert ask(job, on(make_node("n1", f"{key}:NoSchedule"), pod)).delete == ()


def test_pods_that_tolerate_the_notice_stay() -> None:
    """They would be placed on that very node again, and again."""
    job, pod = running()
    pod["spec"]["tolerations"] = [{"operator": "Exists"}]
    assert ask(job, on(make_node("n1", f"{SPOT}:NoSchedule"), pod)).delete == ()


def test_an_end_that_came_first_is_judged_by_itself() -> None:
    job, _ = running()
    crashed = ended(job, terminated(1, message=last_word(1)))
    decision = ask(job, on(make_node("n1", f"{SPOT}:NoSchedule"), crashed))
    assert decision.status is not None
    assert decision.status.attempts[0].cause == "Crash"


def test_a_state_without_a_time_is_certain() -> None:
    assert NodeState(lost="is gone").is_lost(NOW)
    node = silent()
    del node["spec"]["taints"][0]["timeAdded"]
    node["status"]["conditions"][0]["lastTransitionTime"] = at(-60)
    assert read(node).is_lost(NOW)
