"""The specification: what is done about a job in each situation, and which rule says so."""

from typing import Any

import pytest

from diffusion_api.names import pod_name
from diffusion_operator import timestamps
from diffusion_operator.state import Decision, Heard, Refusal, SeenPod
from testkit.builders import (
    NOW,
    at,
    container,
    deleting,
    disrupted,
    last_word,
    make_checkpoint,
    make_job,
    make_pod,
    make_profile,
    make_progress,
    make_report,
    terminated,
)
from testkit.deciding import after, ask, condition, ended, running, started


class TestNobodysBusiness:
    def test_another_controllers_job_is_left_alone_even_if_it_is_invalid(self) -> None:
        job = make_job(managedBy="kueue.x-k8s.io/multikueue", method="Unknown")
        assert ask(job) == Decision(rule="managedBy")

    def test_a_job_that_is_being_deleted_starts_nothing(self) -> None:
        assert ask(make_job(metadata={"deletionTimestamp": at()})) == Decision(rule="deletion")

    @pytest.mark.parametrize("kind", ["Complete", "Failed"])
    @pytest.mark.parametrize("spec", [{}, {"suspend": True}, {"method": "Unknown"}])
    def test_finished_stays_finished(self, kind: str, spec: dict[str, Any]) -> None:
        done = {"type": kind, "status": "True", "reason": "x", "message": "", "lastTransitionTime": at()}
        job = make_job(status={"attempt": 2, "conditions": [done]}, **spec)
        decision = ask(job)
        assert (decision.rule, decision.status, decision.create) == ("finished", None, ())

    def test_finished_keeps_the_newest_log_and_stops_what_still_runs(self) -> None:
        done = {"type": "Failed", "status": "True", "reason": "x", "message": "", "lastTransitionTime": at()}
        job = make_job(status={"attempt": 3, "conditions": [done]})
        pods = [make_pod(job, attempt=n, phase="Failed", node="n") for n in (1, 2)]
        decision = ask(job, *pods, make_pod(job, attempt=3, phase="Running", node="n"))
        assert [pod.name for pod in decision.delete] == ["cats-1-0", "cats-3-0"]


class TestValidation:
    def test_an_invalid_spec_is_refused_with_field_value_and_remedy(self) -> None:
        decision = ask(make_job(training={"maxStep": 3}))
        assert decision.rule == "validation"
        assert condition(decision, "Validated") == ("False", "InvalidSpec")
        assert decision.status is not None
        assert decision.status.message == "spec.training.maxStep: 3: unknown field, did you mean maxSteps?"
        assert decision.status.pending is not None
        assert decision.status.pending.cause == "InvalidSpec"
        assert decision.create == ()

    def test_it_heals_by_a_change_of_the_spec(self) -> None:
        job = make_job(training={"compile": "Always"})
        refused = after(job, ask(job))
        healed = refused | {"spec": make_job()["spec"]}
        decision = ask(healed)
        assert condition(decision, "Validated") == ("True", "Valid")
        assert decision.status is not None
        assert decision.status.pending is None
        assert len(decision.create) == 1

    def test_a_running_attempt_of_a_job_that_became_invalid_is_left_running(self) -> None:
        job, pod = running()
        job["spec"]["training"] = {"compile": "Always"}
        decision = ask(job, pod)
        assert (decision.rule, decision.delete) == ("validation", ())
        assert decision.status is not None
        assert decision.status.phase == "Preparing"


class TestProfile:
    @pytest.mark.parametrize(
        ("spec", "profile", "reason", "words"),
        [
            ({"resources": {"profile": "a100-80g"}}, None, "ProfileNotFound", "did you mean a100-80gb?"),
            ({"resources": {"profile": "z"}}, None, "ProfileNotFound", "there are a100-80gb, cpu"),
            ({}, {"allowedNamespaces": {"names": ["team-b"]}}, "ProfileNotAllowed", "namespace team-a may not use it"),
            ({"resources": {"capacity": "Spot"}}, {"spot": None}, "ProfileWithoutSpot", "no spot nodes"),
            ({}, {"maxGpusPerNode": 0}, "ProfileInvalid", "maxGpusPerNode"),
        ],
    )
    def test_it_says_why_the_profile_cannot_be_used(
        self, spec: dict[str, Any], profile: dict[str, Any] | None, reason: str, words: str
    ) -> None:
        found = make_profile(**profile) if profile is not None else None
        decision = ask(make_job(**spec), profile=found, profile_names=("a100-80gb", "cpu"))
        assert decision.rule == "profile"
        assert condition(decision, "Validated") == ("False", reason)
        assert decision.status is not None
        assert words in decision.status.message
        assert spec.get("resources", {}).get("profile", "") in decision.status.message
        assert decision.create == ()

    def test_the_snapshot_counts_from_the_first_attempt_on(self) -> None:
        job, _ = running()
        gone = ended(job, terminated(75, message=last_word(75)))
        decision = ask(job, gone, profile=None)
        assert decision.status is not None
        assert decision.status.attempt == 2
        limits = decision.create[0]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"


class TestStart:
    def test_number_snapshot_and_conditions_are_written_with_the_pods_to_create(self) -> None:
        decision = ask(make_job())
        status = decision.status
        assert status is not None
        assert (decision.rule, status.attempt, status.phase, status.gpus) == ("attemptStarts", 1, "Scheduling", 1)
        assert (status.attempts[0].number, status.attempts[0].started_at) == (1, at())
        assert status.profiles is not None
        assert status.profiles["a100-80gb"]["resourceName"] == "nvidia.com/gpu"
        assert condition(decision, "PodsReady") == ("False", "Starting")
        assert [pod["metadata"]["name"] for pod in decision.create] == [pod_name("cats", 1, 0)]
        assert status.counters.restarts == 0

    def test_pods_that_a_crash_left_out_are_created_under_the_same_number(self) -> None:
        decision = ask(started(), seconds=3600)
        assert decision.rule == "attemptRuns"
        assert [pod["metadata"]["name"] for pod in decision.create] == ["cats-1-0"]

    def test_a_number_is_never_used_twice_even_if_the_status_was_lost(self) -> None:
        job = make_job()
        decision = ask(job, make_pod(job, attempt=4, phase="Failed", node="n1"))
        assert decision.status is not None
        assert decision.status.attempt == 5

    def test_live_pods_of_earlier_attempts_are_stopped_first(self) -> None:
        job = make_job()
        decision = ask(job, make_pod(job, attempt=4, phase="Running", node="n1"))
        assert (decision.create, [pod.name for pod in decision.delete]) == ((), ["cats-4-0"])

    def test_what_the_api_server_refused_is_said_and_tried_again(self) -> None:
        refusal = Refusal(cause="QuotaExceeded", detail="exceeded quota: gpus", hint="wait")
        decision = ask(started(), refusal=refusal)
        assert decision.status is not None
        assert decision.status.pending is not None
        assert (decision.status.pending.cause, len(decision.create)) == ("QuotaExceeded", 1)


class TestProgress:
    def test_a_pod_without_a_node(self) -> None:
        decision = ask(started(), make_pod(make_job()))
        assert condition(decision, "PodsReady") == ("False", "Waiting")
        assert decision.status is not None
        assert (decision.status.phase, decision.status.pending) == ("Scheduling", None)

    def test_a_running_pod_is_asked_for_progress(self) -> None:
        job, pod = running()
        decision = ask(job, pod)
        assert decision.poll is not None
        assert (decision.poll.name, decision.poll.address) == ("cats-1-0", "10.0.0.7")
        assert condition(decision, "PodsReady") == ("True", "Running")

    def test_what_it_says_goes_into_the_status(self) -> None:
        job, pod = running()
        progress = make_progress(900, loss=0.08123, estimated_remaining_seconds=2500)
        report = make_report(900, progress=progress, latest_checkpoint=make_checkpoint(800), resumed_from_step=0)
        status = ask(job, pod, heard=Heard(report=report)).status
        assert status is not None
        assert status.progress is not None
        assert status.checkpoint is not None
        assert (status.phase, status.message) == ("Running", "step 900/2000, loss 0.0812, 41m left")
        assert (status.progress.done, status.progress.remaining, status.progress.percentage) == ("45%", "41m", 45)
        assert status.checkpoint.at_risk_steps == 100
        assert (status.attempts[0].reached_step, status.attempts[0].resumed_from_step) == (900, 0)

    def test_preparing_says_what_is_prepared(self) -> None:
        job, pod = running()
        report = make_report(0, stage="Preparing", progress=None, detail="encoding images 120/400")
        status = ask(job, pod, heard=Heard(report=report)).status
        assert status is not None
        assert (status.phase, status.message) == ("Preparing", "encoding images 120/400")

    def test_silence_is_said_after_a_while_and_never_fatal(self) -> None:
        job, pod = running()
        heard = Heard(silent_since=NOW, error="connection refused")
        assert condition(ask(job, pod, heard=heard, seconds=119), "Progressing") == ("True", "Preparing")
        late = ask(job, pod, heard=heard, seconds=120)
        assert condition(late, "Progressing") == ("Unknown", "ProgressUnreachable")
        assert late.status is not None
        assert "connection refused" in late.status.message
        assert (late.delete, late.create) == ((), ())

    @pytest.mark.parametrize(("idle", "reason"), [(299, "Running"), (300, "ProgressStale")])
    def test_a_training_that_stands_still_is_told_before_it_counts_as_hung(self, idle: float, reason: str) -> None:
        job, pod = running()
        status = ask(job, pod, heard=Heard(report=make_report(900, idle_seconds=idle)))
        assert condition(status, "Progressing")[1] == reason
        assert status.status is not None
        assert ("after 15m (stallSeconds)" in status.status.message) == (reason == "ProgressStale")

    def test_a_restart_of_the_operator_does_not_make_a_running_job_look_preparing(self) -> None:
        job, pod = running()
        job = after(job, ask(job, pod, heard=Heard(report=make_report(900))))
        status = ask(job, pod).status
        assert status is not None
        assert (status.phase, status.message) == ("Running", "step 900/2000")

    def test_a_pod_told_to_stop_is_waited_for(self) -> None:
        job, pod = running()
        pod["metadata"] |= deleting(asked=0, grace=120)
        decision = ask(job, pod)
        assert decision.status is not None
        assert (decision.status.phase, decision.create, decision.delete) == ("Interrupted", (), ())
        assert decision.again_seconds == pytest.approx(151)


class TestEnd:
    def test_complete(self) -> None:
        job, _ = running()
        files = ({"name": "kohya/cats.safetensors", "sha256": "ab", "bytes": 3},)
        word = last_word(0, step=2000, output=files, progress=make_progress(2000), warnings=("1 image was left out",))
        decision = ask(job, ended(job, terminated(0, message=word), phase="Succeeded"))
        status = decision.status
        assert status is not None
        assert status.output is not None
        assert status.progress is not None
        assert (status.phase, status.attempts[0].cause) == ("Complete", "Completed")
        assert condition(decision, "Complete") == ("True", "Completed")
        assert condition(decision, "PodsReady") == ("False", "AttemptEnded")
        assert status.output.files[0].name == "kohya/cats.safetensors"
        assert status.message == "as the trainer says (1 image was left out)"
        early = last_word(0, step=600, output=files, progress=make_progress(600), stoppedEarlyAt=600)
        decision = ask(job, ended(job, terminated(0, message=early), phase="Succeeded"))
        assert condition(decision, "Complete") == ("True", "StoppedEarly")
        assert status.progress.done == "100%"
        assert decision.create == ()

    @pytest.mark.parametrize(
        ("status", "metadata", "cause"),
        [
            (terminated(75, message=last_word(75, step=700)), {}, "Preempted"),
            (disrupted("PreemptionByScheduler") | terminated(137), deleting(), "Preempted"),
            (disrupted("DeletionByTaintManager"), deleting(), "NodeLost"),
        ],
    )
    def test_preemption_is_free_and_immediate(
        self, status: dict[str, Any], metadata: dict[str, Any], cause: str
    ) -> None:
        job, _ = running(make_job(runPolicy={"backoffLimit": 0}))
        decision = ask(job, ended(job, status, **metadata))
        new = decision.status
        assert new is not None
        assert [(entry.number, entry.cause) for entry in new.attempts] == [(2, None), (1, cause)]
        assert (new.counters.failures, new.counters.preemptions, new.counters.restarts) == (0, 1, 1)
        assert [pod["metadata"]["name"] for pod in decision.create] == ["cats-2-0"]
        assert new.next_attempt_at is None

    def test_a_pod_that_vanished_was_preempted(self) -> None:
        job, pod = running()
        assert ask(job, seconds=1).rule == "attemptEnded"
        for seen in ((), (SeenPod(pod, gone=True),)):
            decision = ask(job, *seen)
            assert decision.status is not None
            assert decision.status.attempts[1].cause == "Preempted"
            assert len(decision.create) == 1

    @pytest.mark.parametrize("code", [64, 65, 66, 70, 77])
    def test_a_users_mistake_fails_at_once(self, code: int) -> None:
        job, _ = running()
        decision = ask(job, ended(job, terminated(code, message=last_word(code, message="spec.x: mend it"))))
        assert decision.status is not None
        assert (decision.status.phase, decision.status.message) == ("Failed", "spec.x: mend it")
        assert condition(decision, "Failed")[0] == "True"
        assert decision.status.counters.failures == 0
        assert decision.create == ()

    @pytest.mark.parametrize("code", [69, 81, 82, 83, 84])
    def test_infrastructure_backs_off_without_being_counted_as_failure(self, code: int) -> None:
        job, _ = running(make_job(runPolicy={"backoffLimit": 0}))
        decision = ask(job, ended(job, terminated(code, message=last_word(code))))
        assert decision.status is not None
        assert (decision.status.phase, decision.status.next_attempt_at) == ("Interrupted", at(11))
        assert (decision.status.counters.failures, decision.status.counters.infrastructure) == (0, 1)
        assert (decision.create, decision.again_seconds) == ((), 11)  # 10 s, and a little by chance

    def test_of_an_end_without_a_last_word_the_end_of_the_log_is_kept(self) -> None:
        job, _ = running()
        log = "Fatal Python error: Segmentation fault\n  File train.py, line 7"
        decision = ask(job, ended(job, terminated(139, message=log)))
        assert decision.status is not None
        assert (decision.status.attempts[0].cause, decision.status.attempts[0].last_lines) == ("Crash", log)

    def test_the_backoff_is_kept_in_the_status(self) -> None:
        job, _ = running()
        pod = ended(job, terminated(1))
        job = after(job, ask(job, pod))
        early = ask(job, pod, seconds=4)
        assert (early.rule, early.create, early.again_seconds) == ("backoff", (), 7)
        late = ask(job, pod, seconds=11)
        assert late.rule == "attemptStarts"
        assert late.status is not None
        assert (late.status.attempt, late.status.next_attempt_at) == (2, None)

    def test_one_ended_rank_stops_the_others(self) -> None:
        job, pod = running()
        other = make_pod(job, rank=1, phase="Failed", node="n2", status=terminated(1))
        decision = ask(job, pod, other)
        assert ([found.name for found in decision.delete], decision.status) == (["cats-1-0"], None)

    def test_gpu_time_and_cost(self) -> None:
        job = started()
        job["status"]["profiles"]["a100-80gb"]["price"] = {"currency": "USD", "onDemand": 3.6}
        pod = make_pod(job, phase="Running", node="n1")
        job = after(job, ask(job, pod))
        pod = ended(job, terminated(0, finished=-40), phase="Succeeded")
        status = ask(job, pod).status
        assert status is not None
        assert status.accounting is not None
        assert (status.accounting.gpu_seconds, status.accounting.estimated_cost) == (60, "0.06 USD")


class TestSuspend:
    def test_pods_are_stopped_and_awaited(self) -> None:
        job, pod = running()
        job["spec"]["suspend"] = True
        decision = ask(job, pod)
        assert [found.name for found in decision.delete] == ["cats-1-0"]
        assert condition(decision, "Suspended") == ("False", "Suspending")

    def test_the_attempt_ends_as_suspended_and_nothing_is_counted(self) -> None:
        job, pod = running()
        job["spec"]["suspend"] = True
        job = after(job, ask(job, pod))
        gone = ended(job, terminated(75, message=last_word(75, step=700)), phase="Failed", **deleting())
        decision = ask(job, SeenPod(gone, gone=True))
        status = decision.status
        assert status is not None
        assert (status.phase, status.attempts[0].cause, decision.create) == ("Suspended", "Suspended", ())
        assert condition(decision, "Suspended") == ("True", "Suspended")
        assert (status.counters.failures, status.counters.preemptions) == (0, 0)
        resumed = after(job, decision)
        resumed["spec"]["suspend"] = False
        decision = ask(resumed)
        assert decision.status is not None
        assert (decision.status.attempt, len(decision.create)) == (2, 1)
        assert condition(decision, "Suspended") == ("False", "Resumed")

    def test_resumed_before_the_pods_had_stopped_it_is_still_a_suspension(self) -> None:
        job, pod = running()
        job["spec"]["suspend"] = True
        job = after(job, ask(job, pod))
        job["spec"]["suspend"] = False
        decision = ask(job, SeenPod(ended(job, terminated(75), **deleting()), gone=True))
        assert decision.status is not None
        assert [entry.cause for entry in decision.status.attempts] == [None, "Suspended"]

    def test_completed_while_it_was_to_stop_is_complete(self) -> None:
        job, pod = running()
        job["spec"]["suspend"] = True
        job = after(job, ask(job, pod))
        decision = ask(job, ended(job, terminated(0), phase="Succeeded", **deleting()))
        assert decision.status is not None
        assert decision.status.phase == "Complete"

    def test_before_the_first_attempt(self) -> None:
        decision = ask(make_job(suspend=True))
        assert decision.status is not None
        assert (decision.status.phase, decision.status.attempt, decision.create) == ("Suspended", 0, ())

    def test_between_status_and_pods(self) -> None:
        job = started()
        job["spec"]["suspend"] = True
        decision = ask(job)
        assert decision.status is not None
        assert (decision.status.phase, decision.status.attempts[0].cause) == ("Suspended", "Suspended")


def test_equal_questions_have_equal_answers_and_settled_jobs_cause_no_writes() -> None:
    job, pod = running()
    pod["status"] |= container(running={"startedAt": at()})
    decision = ask(job, pod)
    assert decision == ask(job, pod)
    assert after(job, decision) == job
    assert timestamps.from_text(job["status"]["conditions"][0]["lastTransitionTime"]) == NOW
