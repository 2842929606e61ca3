"""Before the first attempt: a pod without a GPU, its verdict, and what follows from it."""

from datetime import timedelta
from typing import Any

import pytest
import yaml

from diffusion_api import names
from diffusion_api.outcomes import INFRASTRUCTURE_BUDGET
from diffusion_api.run import PreflightReport, RunConfig
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.decide import decide
from diffusion_operator.desired import event, preflight
from diffusion_operator.state import Decision, Job, Observed, Refusal, SeenPod
from diffusion_operator.status import to_object
from testkit.builders import NOW, Object, deleting, last_word, make_job, make_pod, make_profile, terminated

FOUND = PreflightReport(family="SD1", architecture="SD1", images=40, sampled=8, bytes=10**6, seconds=1.5)


def ask(job: Object, *pods: Object | SeenPod, seconds: float = 0, **seen: Any) -> Decision:
    observed = Observed(
        **{"trainer_image": "trainer:1", "preflight": True, "profile": make_profile()} | seen,
        pods=tuple(pod if isinstance(pod, SeenPod) else SeenPod(pod) for pod in pods),
    )
    return decide(Job.read(job), observed, now=NOW + timedelta(seconds=seconds))


def after(job: Object, decision: Decision) -> Object:
    return job | ({"status": to_object(decision.status)} if decision.status is not None else {})


def created(decision: Decision) -> list[str]:
    return [manifest["metadata"]["name"] for manifest in decision.create]


def condition(decision: Decision, kind: str) -> tuple[str, str, str]:
    assert decision.status is not None
    found = next(entry for entry in decision.status.conditions if entry.type == kind)
    return found.status, found.reason, found.message


def begun(**spec: Any) -> Object:
    """Return a job whose preflight has been asked for."""
    job = make_job(**spec)
    return after(job, ask(job))


def ended(job: Object, code: int, *, number: int = 0, message: str = "as the trainer says", **more: Any) -> Object:
    """Return the preflight's pod after its end."""
    word = last_word(code, attempt=0, message=message, **more)
    phase = "Failed" if code else "Succeeded"
    status = terminated(code, message=word)
    return make_pod(job, attempt=0, rank=number, phase=phase, node="n1", status=status)


class TestStart:
    def test_the_first_thing_is_a_pod_of_the_preflight(self) -> None:
        decision = ask(make_job())
        assert decision.rule == "preflight"
        assert created(decision) == ["cats-preflight"]
        assert decision.status is not None
        assert (decision.status.phase, decision.status.attempt, decision.status.attempts) == ("Preflight", 0, ())
        assert condition(decision, "PreflightPassed")[:2] == ("Unknown", "Starting")

    def test_it_can_be_turned_off(self) -> None:
        decision = ask(make_job(), preflight=False)
        assert (decision.rule, created(decision)) == ("attemptStarts", ["cats-1-0"])

    def test_a_job_that_has_had_an_attempt_is_not_looked_at_again(self) -> None:
        job = make_job()
        job = after(job, ask(job, preflight=False))
        pod = make_pod(job, attempt=1, phase="Failed", node="n1", status=terminated(75, message=last_word(75)))
        assert created(ask(after(job, ask(job, make_pod(job))), pod)) == ["cats-2-0"]

    def test_a_pod_that_is_gone_is_created_again_under_its_name(self) -> None:
        job = begun()
        gone = SeenPod(make_pod(job, attempt=0, phase="Running", node="n1"), gone=True)
        assert created(ask(job, gone)) == created(ask(job)) == ["cats-preflight"]

    def test_a_pod_that_is_there_is_not(self) -> None:
        job = begun()
        for phase in ("Pending", "Running"):
            decision = ask(job, make_pod(job, attempt=0, phase=phase))
            assert (decision.rule, decision.create) == ("preflight", ())

    def test_what_the_api_server_refuses_is_said(self) -> None:
        refusal = Refusal(cause="QuotaExceeded", detail="exceeded quota: small", hint="wait")
        decision = ask(begun(), refusal=refusal)
        assert decision.status is not None
        assert decision.status.pending is not None
        assert decision.status.pending.cause == "QuotaExceeded"
        assert created(decision) == ["cats-preflight"]

    def test_a_missing_secret_is_said_while_it_waits(self) -> None:
        job = begun(credentials={"secretRef": {"name": "team-a-s3"}})
        pod = make_pod(job, attempt=0, node="n1")
        mount = {
            "reason": "FailedMount",
            "message": 'MountVolume.SetUp failed for volume "credentials" : secret "team-a-s3" not found',
            "involvedObject": {"uid": pod["metadata"]["uid"], "kind": "Pod", "name": pod["metadata"]["name"]},
            "lastTimestamp": "2026-01-02T03:04:00Z",
        }
        decision = ask(job, pod, pod_events=(mount,))
        assert decision.status is not None
        assert decision.status.pending is not None
        assert "team-a-s3" in decision.status.pending.detail
        assert decision.status.phase == "Preflight"
        assert decision.again_seconds is not None
        assert "Waiting" in {notice.reason for notice in event.notices(decision.status, now=NOW)}

    def test_a_deleted_job_and_a_suspended_one_start_none(self) -> None:
        assert ask(make_job(suspend=True)).create == ()
        assert ask(make_job(metadata={"deletionTimestamp": "2026-01-02T03:04:05Z"})).create == ()


class TestPassed:
    def test_the_first_attempt_starts_with_the_same_write(self) -> None:
        job = begun()
        decision = ask(job, ended(job, 0, message="preflight passed: SD1 model, 40 images", preflight=FOUND))
        assert condition(decision, "PreflightPassed") == ("True", "Passed", "preflight passed: SD1 model, 40 images")
        assert (decision.status.attempt, created(decision)) == (1, ["cats-1-0"])  # type: ignore[union-attr]
        assert decision.delete == (), "its log is kept"
        assert "PreflightPassed" in {notice.reason for notice in event.notices(decision.status, now=NOW)}  # type: ignore[arg-type]

    def test_its_warnings_are_told(self) -> None:
        job = begun()
        decision = ask(job, ended(job, 0, warnings=("1 of 8 sampled images would be left out",)))
        assert "1 of 8 sampled images" in condition(decision, "PreflightPassed")[2]

    def test_later_looks_neither_repeat_nor_delete_it(self) -> None:
        job = begun()
        pod = ended(job, 0)
        job = after(job, ask(job, pod))
        decision = ask(job, pod, make_pod(job, phase="Running", node="n1"))
        assert (decision.rule, decision.create, decision.delete) == ("attemptRuns", (), ())

    def test_the_first_ended_attempt_takes_its_place(self) -> None:
        job = begun()
        pod = ended(job, 0)
        job = after(job, ask(job, pod))
        done = make_pod(job, phase="Succeeded", node="n1", status=terminated(0, message=last_word(0)))
        job = after(job, ask(job, pod, done))
        assert [one.name for one in ask(job, pod, done).delete] == ["cats-preflight"]


class TestFailed:
    @pytest.mark.parametrize(
        ("code", "reason"),
        [(64, "BadConfig"), (65, "BadData"), (66, "InputMissing"), (77, "PermissionDenied")],
    )
    def test_what_the_user_has_to_mend_fails_the_job_before_any_gpu(self, code: int, reason: str) -> None:
        job = begun()
        decision = ask(job, ended(job, code, message="dataset.source s3://team-a/cats/ has no images"))
        assert decision.status is not None
        assert condition(decision, "Failed") == ("True", reason, "dataset.source s3://team-a/cats/ has no images")
        assert condition(decision, "PreflightPassed")[:2] == ("False", reason)
        assert (decision.status.phase, decision.status.attempt, decision.create) == ("Failed", 0, ())
        assert {"PreflightFailed", "Failed"} <= {n.reason for n in event.notices(decision.status, now=NOW)}
        assert ask(after(job, decision), ended(job, code)).rule == "finished"

    def test_infrastructure_backs_off_under_a_new_name(self) -> None:
        job = begun()
        first = ended(job, 69)
        decision = ask(job, first)
        assert decision.status is not None
        assert (decision.status.phase, decision.again_seconds) == ("Preflight", 10)
        assert decision.status.counters.infrastructure == 1
        job = after(job, decision)
        assert ask(job, first, seconds=5).rule == "backoff"
        again = ask(job, first, seconds=11)
        assert created(again) == ["cats-preflight-1"]
        assert [pod.name for pod in again.delete] == ["cats-preflight"], "what was judged goes"
        job = after(job, again)
        passed = ask(job, ended(job, 0, number=1), seconds=12)
        assert created(passed) == ["cats-1-0"]

    def test_infrastructure_has_a_budget(self) -> None:
        job, seconds = begun(), 0.0
        for number in range(INFRASTRUCTURE_BUDGET + 1):
            decision = ask(job, ended(job, 69, number=number), seconds=seconds)
            job = after(job, decision)
            seconds += 400
        assert condition(decision, "Failed")[1] == "BackoffLimitExceeded"
        assert "failed 11 times" in condition(decision, "Failed")[2]

    def test_a_crash_counts_towards_the_backoff_limit(self) -> None:
        job = begun(runPolicy={"backoffLimit": 1})
        job = after(job, ask(job, ended(job, 1)))
        assert job["status"]["counters"]["failures"] == 1
        decision = ask(job, ended(job, 1, number=1), seconds=60)
        assert condition(decision, "Failed")[1] == "BackoffLimitExceeded"

    def test_a_pod_that_had_to_make_room_is_free_and_replaced_at_once(self) -> None:
        job = begun()
        pod = ended(job, 75)
        decision = ask(job, pod)
        assert decision.again_seconds == 0
        job = after(job, decision)
        assert job["status"]["counters"]["failures"] == 0
        assert created(ask(job, pod)) == ["cats-preflight-1"]

    def test_one_that_never_ends_is_tried_again_and_named(self) -> None:
        job = begun()
        pod = make_pod(job, attempt=0, phase="Failed", node="n1", status={"reason": "DeadlineExceeded"})
        decision = ask(job, pod)
        assert condition(decision, "PreflightPassed")[1] == "Hang"
        assert "did not end within 600 s" in condition(decision, "PreflightPassed")[2]

    def test_of_a_node_that_stopped_answering_nothing_is_waited_for(self) -> None:
        job = begun()
        pod = make_pod(job, attempt=0, phase="Running", node="n1", metadata=deleting(asked=-60, grace=5))
        decision = ask(job, pod)
        assert condition(decision, "PreflightPassed")[1] == "NodeLost"
        assert created(ask(after(job, decision), pod)) == ["cats-preflight-1"]

    def test_one_that_is_being_deleted_is_waited_for(self) -> None:
        job = begun()
        pod = make_pod(job, attempt=0, phase="Running", node="n1", metadata=deleting(asked=-1, grace=5))
        decision = ask(job, pod)
        assert (decision.create, decision.again_seconds) == ((), 35)


class TestSuspend:
    def test_its_pod_is_stopped_and_created_again_on_resume(self) -> None:
        job = begun()
        pod = make_pod(job, attempt=0, phase="Running", node="n1")
        job["spec"]["suspend"] = True
        decision = ask(job, pod)
        assert (decision.rule, [one.name for one in decision.delete]) == ("suspend", ["cats-preflight"])
        job = after(job, decision)
        job["spec"]["suspend"] = False
        resumed = ask(job, SeenPod(pod, gone=True))
        assert created(resumed) == ["cats-preflight"]
        assert condition(resumed, "Suspended")[:2] == ("False", "Resumed")


class TestMemory:
    def test_a_model_that_is_too_large_for_the_profile_fails_the_job(self) -> None:
        found = FOUND.model_copy(update={"family": "SD1", "architecture": "SD1"})
        job = begun(dataset={"resolution": 2048})
        decision = ask(job, ended(job, 0, preflight=found), profile=make_profile(memoryGiB=8))
        assert condition(decision, "Failed")[1] == "InsufficientGPUMemory"
        assert condition(decision, "Validated")[:2] == ("False", "InsufficientGPUMemory")
        message = condition(decision, "PreflightPassed")[2]
        assert "LoRA of SD1 at 2048 px needs about" in message
        assert "has 8 GiB" in message
        assert "set dataset.resolution: 768, or use a profile with " in message
        assert decision.create == ()

    @pytest.mark.parametrize(
        ("architecture", "profile"),
        [("SD1", {}), (None, {"memoryGiB": 1}), ("SD1", {"memoryGiB": None}), ("of-a-newer-release", {"memoryGiB": 1})],
    )
    def test_what_fits_or_is_not_known_starts(self, architecture: str | None, profile: dict[str, Any]) -> None:
        job = begun()
        found = FOUND.model_copy(update={"architecture": architecture})
        decision = ask(job, ended(job, 0, preflight=found), profile=make_profile(**profile))
        assert created(decision) == ["cats-1-0"]

    def test_where_the_job_names_the_family_no_pod_is_needed(self) -> None:
        job = make_job(model={"family": "SD1"}, dataset={"resolution": 2048})
        decision = ask(job, profile=make_profile(memoryGiB=8))
        assert decision.rule == "profile"
        assert condition(decision, "Validated")[:2] == ("False", "InsufficientGPUMemory")
        assert decision.create == ()


class TestPod:
    @pytest.fixture
    def manifest(self) -> Object:
        overrides = {
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "team", "operator": "Exists"}],
            "labels": {"cost-centre": "7"},
            "schedulerName": "volcano",
            "imagePullSecrets": [{"name": "pull"}],
        }
        spec = {
            "credentials": {"secretRef": {"name": "s3"}, "serviceAccountName": "trainer"},
            "podOverrides": overrides,
        }
        job = Job.read(make_job(resources={"capacity": "Spot"}, **spec))
        assert job.spec is not None, job.problems
        profile = ProfileSpec.model_validate(make_profile(runtimeClassName="nvidia")["spec"])
        return preflight.build(job, job.spec, profile, number=2, trainer_image="trainer:1")

    def test_nothing_of_it_asks_for_a_gpu_or_its_node(self, manifest: Object) -> None:
        text = yaml.safe_dump(manifest["spec"])
        assert not [
            word for word in ("nvidia", "gke-spot", "affinity", "runtimeClass", "volcano", "shm") if word in text
        ]
        container = manifest["spec"]["containers"][0]
        assert set(container["resources"]["limits"]) == {"memory", "ephemeral-storage"}
        assert container["command"] == ["python", "-m", "diffusion_trainer", "--preflight"]

    def test_what_the_user_set_and_the_credentials_are_kept(self, manifest: Object) -> None:
        spec = manifest["spec"]
        assert spec["nodeSelector"] == {"zone": "a"}
        assert [one["key"] for one in spec["tolerations"]] == ["team"]
        assert (spec["serviceAccountName"], spec["imagePullSecrets"]) == ("trainer", [{"name": "pull"}])
        mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]} == {"run", "work", "tmp", "credentials"}
        assert manifest["metadata"]["labels"]["cost-centre"] == "7"

    def test_it_passes_pod_security_and_ends_by_itself(self, manifest: Object) -> None:
        spec = manifest["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert (spec["activeDeadlineSeconds"], spec["restartPolicy"]) == (600, "Never")

    def test_its_name_and_labels_say_what_it_is(self, manifest: Object) -> None:
        assert manifest["metadata"]["name"] == "cats-preflight-2"
        labels = manifest["metadata"]["labels"]
        assert (labels[names.LABEL_ATTEMPT], labels[names.LABEL_RANK]) == ("0", "2")
        longest = names.preflight_name("x" * names.MAX_JOB_NAME, 30)
        assert len(longest) <= 63

    def test_it_is_told_the_very_run(self, manifest: Object) -> None:
        run = RunConfig.model_validate_json(manifest["metadata"]["annotations"][names.ANNOTATION_RUN])
        assert run.spec.dataset.source == "s3://team-a/cats/"
