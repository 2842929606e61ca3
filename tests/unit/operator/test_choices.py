"""`resources.alternatives` and capacity Any: which choice an attempt uses, when it is given up, and for how long."""

from typing import Any

import pytest

from diffusion_api import names
from diffusion_api.memory import largest_micro_batch
from diffusion_api.resources import NodeCapacity
from diffusion_api.run import RunConfig
from diffusion_operator.policies.choices import Choice, ladder
from diffusion_operator.state import Case, Job, Observed
from diffusion_operator.status import MAX_BYTES, size, to_object
from testkit.builders import NOW, Object, at, last_word, make_job, make_profile
from testkit.deciding import ask
from testkit.simulation import Simulation

BUSY = "1 Insufficient nvidia.com/gpu"
NONE = "1 node(s) didn't match Pod's node affinity/selector"
MINUTE, HOUR = 60, 3600


def rtx(**spec: Any) -> Object:
    """Return a smaller GPU class without spot nodes."""
    product = [{"key": "nvidia.com/gpu.product", "values": ["NVIDIA-GeForce-RTX-4090"]}]
    return make_profile(name="rtx-4090", **({"memoryGiB": 24, "nodeAffinity": product, "spot": None} | spec))


def asking(*alternatives: str, capacity: str = "OnDemand", **more: Any) -> Object:
    """Return a job that would have an A100 and takes these profiles, too."""
    others = [{"profile": name} for name in alternatives]
    return make_job(resources={"capacity": capacity, "alternatives": others} | more.pop("resources", {}), **more)


class World(Simulation):
    """A job whose pods find nodes or do not."""

    def __init__(self, job: Object, **profiles: Any) -> None:
        super().__init__(job, others=profiles.pop("others", (rtx(),)), **profiles)
        self.settle()

    def wait(self, seconds: float, why: str = BUSY) -> None:
        """Let time pass while the newest pod finds no node."""
        self.find_no_node(self.pod, why)
        self.settle()
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        self.settle()
        self.settle()  # news of a pod that was deleted

    def run(self, *, until: int | None = None, seconds: float = 60, **status: Any) -> None:
        """Let the newest pod run for a while and end with that exit code."""
        pod = self.pod
        self.run_pod(pod)
        self.settle()
        self.seconds += seconds
        if until is not None:
            self.end_pod(pod, until, message=last_word(until, attempt=self.status["attempt"], step=100), **status)
        self.settle()

    @property
    def pod(self) -> str:
        return f"cats-{self.status['attempt']}-0"

    @property
    def choice(self) -> tuple[str, str]:
        placement = self.status["placement"]
        return placement["profile"], placement["capacity"]

    @property
    def spec(self) -> Object:
        found: Object = self.cluster.pods["team-a", self.pod]["spec"]
        return found

    @property
    def bound(self) -> int | None:
        text = self.cluster.pods["team-a", self.pod]["metadata"]["annotations"][names.ANNOTATION_RUN]
        return RunConfig.model_validate_json(text).micro_batch_size


class TestLadder:
    def of(self, job: Object, **seen: Any) -> tuple[Choice, ...]:
        observed = Observed(trainer_image="t", **({"profile": make_profile()} | seen))
        return ladder(Case(job=Job.read(job), seen=observed, now=NOW))

    def test_any_is_spot_and_then_on_demand(self) -> None:
        assert self.of(asking(capacity="Any")) == (Choice("a100-80gb", "Spot"), Choice("a100-80gb", "OnDemand"))

    def test_any_of_a_profile_without_spot_nodes_is_on_demand(self) -> None:
        found = self.of(asking(capacity="Any"), profile=make_profile(spot=None))
        assert found == (Choice("a100-80gb", "OnDemand"),)

    def test_alternatives_follow_in_order_and_once(self) -> None:
        capacities: tuple[NodeCapacity, ...] = ("Spot", "OnDemand")
        job = make_job(
            resources={
                "capacity": "Spot",
                "alternatives": [
                    {"profile": "rtx-4090"},
                    {"profile": "a100-80gb", "capacity": "Any"},
                    {"profile": "l4", "capacity": "Any"},
                ],
            }
        )
        found = self.of(job, alternatives={"rtx-4090": rtx(), "l4": make_profile(name="l4")})
        expected = [Choice("a100-80gb", "Spot"), Choice("rtx-4090", "OnDemand"), Choice("a100-80gb", "OnDemand")]
        assert found == (*expected, *(Choice("l4", capacity) for capacity in capacities))


class TestMoving:
    def test_a_busy_class_is_left_after_the_stated_time_and_not_before(self) -> None:
        world = World(asking("rtx-4090"))
        assert world.choice == ("a100-80gb", "OnDemand")
        world.wait(299)
        assert world.choice == ("a100-80gb", "OnDemand")
        world.pass_time(1)
        assert world.choice == ("rtx-4090", "OnDemand")
        status = world.status
        assert [name for _, name in world.cluster.pods] == ["cats-2-0"]
        terms = world.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert terms["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] == ["NVIDIA-GeForce-RTX-4090"]
        assert [(item["profile"], item.get("cause")) for item in status["attempts"]] == [
            ("rtx-4090", None),
            ("a100-80gb", "NoCapacity"),
        ]
        assert (status["counters"]["failures"], status["counters"]["preemptions"]) == (0, 0)
        placement = status["placement"]
        assert (placement["reason"], placement["since"]) == ("NoCapacity", at(300))
        assert placement["message"].startswith("choice 2 of 2: rtx-4090 OnDemand, after a100-80gb OnDemand: no node ")
        assert "InsufficientGPU" in placement["message"]
        assert [(item["profile"], item["until"]) for item in status["unavailable"]] == [("a100-80gb", at(2100))]
        told = {event["reason"]: event for event in world.cluster.events.values()}
        assert (told["MovedOn"]["type"], "AttemptFailed" in told) == ("Normal", False)

    def test_one_looks_again_at_the_right_time(self) -> None:
        world = World(asking("rtx-4090", resources={"failoverSeconds": 50}))
        world.find_no_node(world.pod, BUSY)
        assert world.settle() == 50

    def test_what_is_impossible_is_left_after_a_minute(self) -> None:
        world = World(asking("rtx-4090"))
        world.wait(59, NONE)
        assert world.choice[0] == "a100-80gb"
        world.pass_time(1)
        assert world.choice[0] == "rtx-4090"

    def test_without_another_choice_one_waits(self) -> None:
        world = World(asking())
        world.wait(24 * HOUR, NONE)
        assert (world.choice, world.status["attempt"]) == (("a100-80gb", "OnDemand"), 1)

    @pytest.mark.parametrize("change", ["promised", "preempting", "gated", "placed"])
    def test_a_node_on_its_way_and_a_place_in_a_queue_are_not_given_up(self, change: str) -> None:
        world = World(asking("rtx-4090"))
        pod = world.cluster.pods["team-a", world.pod]
        world.find_no_node(world.pod, BUSY)
        if change == "promised":
            world.cluster.pod_events = [
                {
                    "involvedObject": {"kind": "Pod", "name": world.pod, "uid": pod["metadata"]["uid"]},
                    "reason": "TriggeredScaleUp",
                    "message": "pod triggered scale-up: [{pool 0->1 (max: 4)}]",
                    "lastTimestamp": at(20),
                }
            ]
        elif change == "preempting":
            status = world.cluster.pods["team-a", world.pod]["status"]
            world.cluster.set_pod(world.pod, status={**status, "nominatedNodeName": "n1"})
        elif change == "gated":
            gates = [{"name": "kueue.x-k8s.io/admission"}]
            world.cluster.set_pod(
                world.pod, spec={**pod["spec"], "schedulingGates": gates}, status={"phase": "Pending"}
            )
        else:
            world.cluster.set_pod(world.pod, spec={**pod["spec"], "nodeName": "n1"}, status={"phase": "Pending"})
        world.settle()
        world.pass_time(10 * MINUTE)
        assert (world.choice[0], world.status["attempt"]) == ("a100-80gb", 1)

    def test_a_promise_that_is_not_kept_moves_it(self) -> None:
        world = World(asking("rtx-4090"))
        pod = world.cluster.pods["team-a", world.pod]
        world.cluster.pod_events = [
            {
                "involvedObject": {"kind": "Pod", "name": world.pod, "uid": pod["metadata"]["uid"]},
                "reason": "TriggeredScaleUp",
                "message": "pod triggered scale-up: [{pool 0->1 (max: 4)}]",
                "lastTimestamp": at(20),
            }
        ]
        world.wait(21 * MINUTE)
        assert world.choice[0] == "rtx-4090"

    def test_a_running_attempt_stays_where_it_is(self) -> None:
        world = World(asking("rtx-4090"))
        world.wait(300)
        world.run(seconds=HOUR)
        assert (world.choice, world.status["attempt"]) == (("rtx-4090", "OnDemand"), 2)

    def test_of_several_pods_one_without_a_node_moves_all(self) -> None:
        world = World(asking("rtx-4090", resources={"nodes": 2, "failoverSeconds": 60}))
        world.run_pod("cats-1-0")
        world.find_no_node("cats-1-1", BUSY)
        world.settle()
        world.pass_time(60)
        assert world.status["attempt"] == 1  # the one that runs saves first
        world.end_pod("cats-1-0", 75, message=last_word(75))
        world.cluster.drop_pod("cats-1-0")
        world.settle()
        assert world.choice[0] == "rtx-4090"
        assert world.status["attempts"][1]["cause"] == "NoCapacity"
        assert {name for _, name in world.cluster.pods} == {"cats-2-0", "cats-2-1"}

    def test_an_operator_that_is_restarted_in_the_middle_comes_to_the_same(self) -> None:
        world = World(asking("rtx-4090"))
        world.find_no_node(world.pod, BUSY)
        world.settle()
        world.seconds += 300
        world.look()  # the pod is told to go
        world.restart()
        world.settle()
        assert (world.choice[0], world.status["attempts"][1]["cause"]) == ("rtx-4090", "NoCapacity")


class TestReturning:
    def test_where_all_are_given_up_one_stays_and_begins_anew_after_half_an_hour(self) -> None:
        world = World(asking("rtx-4090"))
        world.wait(300)
        world.wait(29 * MINUTE)
        assert world.choice[0] == "rtx-4090"
        world.pass_time(MINUTE)
        assert (world.choice[0], world.status["placement"]["reason"]) == ("a100-80gb", "NoCapacity")
        world.wait(300)
        assert world.choice[0] == "a100-80gb"  # the other one is passed over for half an hour, too
        world.pass_time(25 * MINUTE)
        assert world.choice[0] == "rtx-4090"

    def test_a_long_wait_keeps_what_the_job_has_been_through(self) -> None:
        world = World(asking("rtx-4090"))
        world.run(until=69)  # the storage was away
        for _ in range(12):
            world.pass_time(10)
            world.wait(31 * MINUTE)
        causes = [item.get("cause") for item in world.status["attempts"]]
        assert causes == [None, "NoCapacity", "StorageUnavailable"]
        assert world.status["attempt"] > 8

    def test_the_next_attempt_begins_with_the_first_choice_that_was_not_given_up(self) -> None:
        world = World(asking("rtx-4090"))
        world.wait(300)
        world.run(until=75, seconds=10 * MINUTE)
        assert world.choice[0] == "rtx-4090"
        world.run(until=75, seconds=30 * MINUTE)
        assert world.choice[0] == "a100-80gb"
        assert world.status["placement"]["reason"] == "Again"
        assert world.status["placement"]["message"] == "choice 1 of 2: a100-80gb OnDemand is tried again"

    def test_a_deadline_counts_over_all_choices(self) -> None:
        world = World(asking("rtx-4090", runPolicy={"pendingDeadlineSeconds": 500}))
        world.wait(300)
        world.wait(199)
        assert world.status["phase"] == "Scheduling"
        world.pass_time(1)
        failed = [item for item in world.status["conditions"] if item["type"] == "Failed"]
        assert failed[0]["reason"] == "PendingDeadlineExceeded"

    def test_the_deadline_begins_anew_once_the_job_has_run(self) -> None:
        world = World(asking("rtx-4090", runPolicy={"pendingDeadlineSeconds": 500}))
        world.wait(300)
        world.run(until=75, seconds=300)
        world.wait(299)
        assert world.status["phase"] == "Scheduling"


class TestSpot:
    def test_any_begins_on_spot_nodes_and_moves_where_there_are_none(self) -> None:
        world = World(asking(capacity="Any"))
        assert world.spec["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
        world.wait(60, NONE)
        assert world.choice == ("a100-80gb", "OnDemand")
        assert "nodeSelector" not in world.spec

    def test_nodes_that_are_taken_away_three_times_in_an_hour_are_left(self) -> None:
        world = World(asking(capacity="Any"))
        for _ in range(3):
            assert world.choice == ("a100-80gb", "Spot")
            world.run(until=75, seconds=10 * MINUTE)
        assert (world.choice[1], world.status["placement"]["reason"]) == ("OnDemand", "Preempted")
        assert world.status["counters"]["preemptions"] == 3
        world.run(until=75, seconds=31 * MINUTE)
        assert (world.choice[1], world.status["placement"]["reason"]) == ("Spot", "Again")

    @pytest.mark.parametrize(("codes", "seconds"), [((75, 75), 600), ((75, 75, 75), 1900), ((75, 75, 69), 600)])
    def test_fewer_or_rarer_or_of_another_cause_are_not(self, codes: tuple[int, ...], seconds: float) -> None:
        world = World(asking(capacity="Any"))
        for code in codes:
            world.run(until=code, seconds=seconds)
            world.pass_time(10 if code == 69 else 0)
        assert world.choice == ("a100-80gb", "Spot")

    def test_spot_alone_is_never_left(self) -> None:
        world = World(asking(capacity="Spot"))
        for _ in range(5):
            world.run(until=75)
        assert world.choice == ("a100-80gb", "Spot")
        assert "unavailable" not in world.status or not world.status["unavailable"]


class TestGpu:
    def test_a_bound_of_a_large_gpu_holds_for_a_smaller_one(self) -> None:
        world = World(asking("rtx-4090", training={"batchSize": 64}))
        world.run(until=80)
        assert world.bound == 32
        world.wait(300)
        assert (world.choice[0], world.bound) == ("rtx-4090", 32)

    def test_where_the_network_is_known_the_estimate_is_the_bound(self) -> None:
        job = asking("rtx-4090", training={"batchSize": 512}, model={"family": "SD1"})
        spec = Job.read(job).spec
        assert spec is not None
        fits = largest_micro_batch(spec, "SD1", 24)
        assert 1 < fits < 512
        world = World(job)
        assert world.bound is None
        world.wait(300)
        assert world.bound == fits

    def test_a_bound_of_a_small_gpu_does_not_hold_for_a_larger_one(self) -> None:
        job = make_job(
            resources={"profile": "rtx-4090", "alternatives": [{"profile": "a100-80gb"}]}, training={"batchSize": 64}
        )
        world = World(job)
        world.run(until=80)
        world.wait(300)
        assert (world.choice[0], world.bound) == ("a100-80gb", None)

    def test_each_gpu_has_a_budget_of_its_own(self) -> None:
        world = World(asking("rtx-4090", training={"batchSize": 1024}))
        for _ in range(4):
            world.run(until=80)
        assert (world.bound, world.status["placement"]["retunes"]) == (64, 4)
        world.wait(300)
        assert world.choice[0] == "rtx-4090"
        for _ in range(4):
            world.run(until=80)
        assert (world.status["phase"], world.bound) == ("Scheduling", 4)
        world.run(until=80)
        assert world.status["phase"] == "Failed"

    def test_each_attempt_costs_what_its_own_choice_does(self) -> None:
        price = {"currency": "USD", "spot": 1.0, "onDemand": 3.0}
        other = rtx(price={"currency": "EUR", "onDemand": 0.5})
        world = World(asking("rtx-4090", capacity="Any"), profile=make_profile(price=price), others=(other,))
        world.run(until=75, seconds=HOUR)
        world.wait(60, NONE)
        world.run(until=75, seconds=10 * MINUTE)
        world.wait(60, NONE)
        assert world.choice == ("rtx-4090", "OnDemand")
        world.run(until=0, seconds=2 * HOUR)
        accounting = world.status["accounting"]
        assert accounting["costs"] == pytest.approx({"USD": 1.5, "EUR": 1.0}, abs=1e-4)
        assert accounting["estimatedCost"] == "1.00 EUR + 1.50 USD"


class TestSnapshot:
    def test_alternatives_stay_what_they_were(self) -> None:
        world = World(asking("rtx-4090"))
        del world.cluster.profiles["rtx-4090"]
        world.cluster.add_profile(make_profile(image="another:1"))
        world.wait(300)
        assert world.choice[0] == "rtx-4090"
        assert world.spec["containers"][0]["image"] == "t"

    def test_the_status_keeps_within_its_size_with_as_many_as_there_can_be(self) -> None:
        others = tuple(make_profile(name=f"class-{number}", description="x" * 1000) for number in range(4))
        world = World(asking(*(f"class-{number}" for number in range(4)), capacity="Any"), others=others)
        for _ in range(12):
            world.run(until=75, seconds=MINUTE)
        status = Job.read(next(iter(world.cluster.jobs.values()))).status
        words = {"message": "m" * 1024, "last_lines": "l" * 1024}
        full = status.model_copy(
            update={"attempts": tuple(item.model_copy(update=words) for item in status.attempts), "message": "m" * 1024}
        )
        assert set(to_object(full)["profiles"]) == {"a100-80gb", *(f"class-{number}" for number in range(4))}
        assert size(to_object(full)) <= MAX_BYTES


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "job", "reason", "words"),
        [
            (None, {}, "ProfileNotFound", "spec.resources.alternatives[0].profile: rtx-4090: there is no such"),
            ({"allowedNamespaces": {"names": ["team-b"]}}, {}, "ProfileNotAllowed", "alternatives[0].profile"),
            ({"limits": {"maxGpus": 1}}, {"resources": {"nodes": 2}}, "ProfileLimit", "rtx-4090 allows 1 per job"),
            ({"maxGpusPerNode": 1}, {"resources": {"gpusPerNode": 2}}, "ProfileLimit", "rtx-4090 has 1"),
            (
                {"resourceName": "nvidia.com/mig-3g.40gb", "memoryGiB": None},
                {"resources": {"gpusPerNode": 2}},
                "ProfileLimit",
                "slices of GPUs (MIG), which NCCL cannot train on together",
            ),
            ({"memoryGiB": 2}, {"model": {"family": "SD1"}}, "InsufficientGPUMemory", "alternatives[0].profile"),
            (
                {"resourceName": "nvidia.com/mig-1g.5gb", "memoryGiB": None},
                {"model": {"family": "SD1"}, "training": {"mixedPrecision": "FP32"}},
                "InsufficientGPUMemory",
                "a GPU of the profile has 5 GiB",
            ),
            ({"device": "CPU"}, {}, "ProfileUnlike", "it has device CPU"),
            ({"memoryGiB": "much"}, {}, "ProfileInvalid", "spec.memoryGiB is wrong"),
        ],
    )
    def test_an_alternative_that_cannot_be_used_refuses_the_job(
        self, changes: Object | None, job: Object, reason: str, words: str
    ) -> None:
        offered = {} if changes is None else {"rtx-4090": rtx(**changes)}
        status = ask(asking("rtx-4090", **job), alternatives=offered).status
        assert status is not None
        found = next(item for item in status.conditions if item.type == "Validated")
        assert (found.status, found.reason) == ("False", reason)
        assert words in found.message

    def test_spot_of_an_alternative_without_spot_nodes(self) -> None:
        job = make_job(resources={"alternatives": [{"profile": "rtx-4090", "capacity": "Spot"}]})
        status = ask(job, alternatives={"rtx-4090": rtx()}).status
        assert status is not None
        assert "spec.resources.alternatives[0].capacity: Spot" in status.message

    def test_a_profile_that_comes_later_is_heard_of(self) -> None:
        world = World(asking("rtx-4090"), others=())
        assert world.status["phase"] == "Pending"
        assert world.knowledge.jobs_with(rtx()) == [world.uid]
        world.cluster.add_profile(rtx())
        world.settle()
        assert world.status["phase"] == "Scheduling"
