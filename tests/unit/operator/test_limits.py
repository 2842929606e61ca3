"""Deadlines, GPU-hours and hangs: up to the last second nothing happens, then pods save and stop, then it is final."""

import pytest

from diffusion_operator.policies.stall import MARGIN_SECONDS
from diffusion_operator.state import Decision, Heard, SeenPod
from testkit.builders import (
    NOW,
    Object,
    at,
    deleting,
    last_word,
    make_checkpoint,
    make_job,
    make_pod,
    make_profile,
    make_report,
    terminated,
)
from testkit.deciding import after, ask, condition, ended, running, started

SAID = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
UNSCHEDULABLE = {
    "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": SAID}]
}
YIELDED = terminated(75, message=last_word(75, step=700))


def stopped(job: Object, *, seconds: float, status: Object = YIELDED) -> SeenPod:
    """Return the pod after it was told to stop: it has saved, and is gone."""
    return SeenPod(ended(job, status, **deleting(asked=seconds - 5)), gone=True)


class TestActiveDeadline:
    @property
    def job(self) -> Object:
        return make_job(runPolicy={"activeDeadlineSeconds": 600, "backoffLimit": 0})

    def test_it_counts_from_the_first_look(self) -> None:
        job = started(self.job)
        assert job["status"]["startTime"] == at()

    @pytest.mark.parametrize(("seconds", "rule"), [(599, "attemptRuns"), (600, "limits"), (601, "limits")])
    def test_the_boundary(self, seconds: float, rule: str) -> None:
        job, pod = running(self.job)
        decision = ask(job, pod, seconds=seconds)
        assert decision.rule == rule
        assert [found.name for found in decision.delete] == (["cats-1-0"] if rule == "limits" else [])

    def test_it_has_a_timer_of_its_own(self) -> None:
        job, pod = running(self.job)
        assert ask(job, pod, seconds=100).again_seconds == 500
        assert ask(make_job(), make_pod(make_job())).again_seconds != 600

    def test_the_pods_save_first_and_then_it_fails(self) -> None:
        job, pod = running(self.job)
        told = ask(job, pod, seconds=600)
        assert told.status is not None
        assert (told.status.phase, told.status.attempts[0].ended_at) == ("Interrupted", None)
        job = after(job, told)
        waits = ask(job, make_pod(job, phase="Running", node="n1", metadata=deleting(asked=600)), seconds=650)
        assert (waits.rule, waits.delete, waits.create) == ("limits", (), ())
        decision = ask(after(job, waits), stopped(job, seconds=655), seconds=660)
        status = decision.status
        assert status is not None
        assert (status.phase, status.attempts[0].cause) == ("Failed", "DeadlineExceeded")
        assert condition(decision, "Failed") == ("True", "DeadlineExceeded")
        assert "runPolicy.activeDeadlineSeconds, which is 600" in status.message
        assert (status.attempts[0].reached_step, status.attempts[0].exit_code) == (700, 75)
        assert (status.counters.preemptions, status.counters.failures, decision.create) == (0, 0, ())
        assert decision.again_seconds == 0

    def test_the_reason_survives_a_restart_and_a_longer_deadline(self) -> None:
        """What was told to stop for the deadline has not been preempted, whatever the spec says by now."""
        job, pod = running(self.job)
        job = after(job, ask(job, pod, seconds=600))
        job["spec"]["runPolicy"]["activeDeadlineSeconds"] = 10_000
        decision = ask(job, seconds=601)
        assert condition(decision, "Failed") == ("True", "DeadlineExceeded")

    @pytest.mark.parametrize(
        ("code", "kind", "reason"), [(0, "Complete", "Completed"), (64, "Failed", "BadConfig"), (1, "Failed", "")]
    )
    def test_what_is_final_about_the_attempts_own_end_goes_before(self, code: int, kind: str, reason: str) -> None:
        job, _ = running(self.job)
        pod = ended(job, terminated(code, message=last_word(code)), phase="Failed" if code else "Succeeded")
        assert condition(ask(job, pod, seconds=700), kind) == ("True", reason or "DeadlineExceeded")

    def test_it_strikes_during_a_backoff_and_before_any_pod_too(self) -> None:
        job, _ = running(make_job(runPolicy={"activeDeadlineSeconds": 600}))
        job = after(job, ask(job, ended(job, terminated(1)), seconds=595))
        assert job["status"]["nextAttemptAt"] == at(606)
        waits = ask(job, seconds=596)
        assert (waits.rule, waits.again_seconds) == ("backoff", 4)
        assert condition(ask(job, seconds=600), "Failed") == ("True", "DeadlineExceeded")
        unborn = started(self.job)
        decision = ask(unborn, seconds=600)
        assert (condition(decision, "Failed"), decision.create) == (("True", "DeadlineExceeded"), ())

    def test_it_starts_anew_when_a_suspended_job_resumes(self) -> None:
        job, pod = running(self.job)
        job["spec"]["suspend"] = True
        job = after(job, ask(job, pod, seconds=500))
        job = after(job, ask(job, stopped(job, seconds=505), seconds=510))
        assert "startTime" not in job["status"]
        assert ask(job, seconds=5000).rule == "suspend", "suspended is no time at all"
        job["spec"]["suspend"] = False
        job = after(job, ask(job, seconds=5000))
        assert (job["status"]["startTime"], job["status"]["attempt"]) == (at(5000), 2)
        assert ask(job, make_pod(job, attempt=2, phase="Running", node="n"), seconds=5599).rule == "attemptRuns"
        assert ask(job, make_pod(job, attempt=2, phase="Running", node="n"), seconds=5600).rule == "limits"

    def test_a_preemption_does_not_start_it_anew(self) -> None:
        job, _ = running(self.job)
        job = after(job, ask(job, ended(job, YIELDED), seconds=300))
        assert (job["status"]["attempt"], job["status"]["startTime"]) == (2, at())


class TestPendingDeadline:
    @property
    def job(self) -> Object:
        return make_job(runPolicy={"pendingDeadlineSeconds": 300})

    @pytest.mark.parametrize(("seconds", "rule"), [(299, "attemptRuns"), (300, "limits")])
    def test_the_boundary(self, seconds: float, rule: str) -> None:
        job = started(self.job)
        assert ask(job, make_pod(job, status=UNSCHEDULABLE), seconds=seconds).rule == rule

    def test_the_message_says_what_was_waited_for(self) -> None:
        job = started(self.job)
        pod = make_pod(job, status=UNSCHEDULABLE)
        job = after(job, ask(job, pod, seconds=200))
        pending = job["status"]["pending"]
        job = after(job, ask(job, pod, seconds=300))
        decision = ask(job, seconds=301)
        assert condition(decision, "Failed") == ("True", "PendingDeadlineExceeded")
        assert decision.status is not None
        assert decision.status.attempts[0].cause == "PendingDeadlineExceeded"
        for words in (pending["cause"], pending["detail"], pending["hint"], "pendingDeadlineSeconds, which is 300"):
            assert words in decision.status.message

    def test_what_runs_or_has_run_does_not_wait(self) -> None:
        job, pod = running(self.job)
        assert ask(job, pod, seconds=10_000).rule == "attemptRuns"
        done = ended(job, terminated(0, message=last_word(0)), phase="Succeeded")
        assert condition(ask(started(self.job), done, seconds=10_000), "Complete") == ("True", "Completed")

    def test_each_attempt_has_its_own(self) -> None:
        job, _ = running(self.job)
        job = after(job, ask(job, ended(job, YIELDED), seconds=1000))
        pod = make_pod(job, attempt=2)
        assert ask(job, pod, seconds=1299).rule == "attemptRuns"
        assert ask(job, pod, seconds=1300).rule == "limits"

    def test_pods_that_the_api_server_refuses_are_waited_for_too(self) -> None:
        job = started(self.job)
        assert ask(job, seconds=299).create
        decision = ask(job, seconds=300)
        assert (condition(decision, "Failed"), decision.create) == (("True", "PendingDeadlineExceeded"), ())

    def test_so_is_the_preflight(self) -> None:
        job = after(self.job, ask(self.job, preflight=True))
        pod = make_pod(job, attempt=0, metadata={"creationTimestamp": at()})
        early = ask(job, pod, preflight=True, seconds=299)
        assert (early.rule, early.again_seconds) == ("preflight", 1)
        late = ask(job, pod, preflight=True, seconds=300)
        assert condition(late, "Failed") == ("True", "PendingDeadlineExceeded")
        assert [found.name for found in late.delete] == [pod["metadata"]["name"]]


class TestGPUHours:
    """Pods of `running` have a start time 100 s before NOW; one hour is 3600 s."""

    @pytest.mark.parametrize(("policy", "profile", "hours"), [(1, None, 1), (None, 1, 1), (0.5, 1, 0.5), (1, 0.5, 0.5)])
    def test_the_smaller_of_the_jobs_and_the_profiles(
        self, policy: float | None, profile: float | None, hours: float
    ) -> None:
        found = make_profile(limits={"maxGPUHours": profile} if profile else {})
        job = make_job(runPolicy={"maxGPUHours": policy} if policy else {})
        job = after(job, ask(job, profile=found))
        pod = make_pod(job, phase="Running", node="n1")
        last = hours * 3600 - 100
        early = ask(job, pod, seconds=last - 1)
        assert (early.rule, early.again_seconds) == ("attemptRuns", 1)
        decision = ask(job, pod, seconds=last)
        assert (decision.rule, [found.name for found in decision.delete]) == ("limits", ["cats-1-0"])
        job = after(job, decision)
        decision = ask(job, stopped(job, seconds=last + 5), seconds=last + 10)
        assert condition(decision, "Failed") == ("True", "GPUHoursExceeded")
        assert decision.status is not None
        assert f" of {hours:g}" in decision.status.message

    def test_they_add_up_over_attempts(self) -> None:
        job, _ = running(make_job(runPolicy={"maxGPUHours": 1}))
        job = after(job, ask(job, ended(job, terminated(75, message=last_word(75), finished=3000)), seconds=3000))
        assert job["status"]["accounting"]["gpuSeconds"] == 3100
        pod = make_pod(job, attempt=2, phase="Running", node="n1", status={"startTime": at(3100)})
        assert ask(job, pod, seconds=3599).rule == "attemptRuns"
        assert ask(job, pod, seconds=3600).rule == "limits"

    def test_all_gpus_count(self) -> None:
        job, _ = running(
            make_job(runPolicy={"maxGPUHours": 1}, resources={"gpusPerNode": 4}, training={"batchSize": 8})
        )
        pod = make_pod(job, phase="Running", node="n1")
        assert ask(job, pod, seconds=799).again_seconds == 1
        assert ask(job, pod, seconds=800).rule == "limits"

    def test_no_attempt_starts_when_they_are_used_up(self) -> None:
        job, _ = running(make_job(runPolicy={"maxGPUHours": 1}))
        decision = ask(job, ended(job, terminated(1, finished=3600)), seconds=3605)
        assert (condition(decision, "Failed"), decision.create) == (("True", "GPUHoursExceeded"), ())

    def test_without_gpus_there_is_nothing_to_count(self) -> None:
        job = make_job(runPolicy={"maxGPUHours": 0.001}, resources={"profile": "cpu"})
        profile = make_profile(name="cpu", resourceName=None, device="CPU")
        job = after(job, ask(job, profile=profile))
        pod = make_pod(job, phase="Running", node="n1")
        assert ask(job, pod, profile=profile, seconds=100_000).rule == "attemptRuns"


class TestStall:
    @property
    def job(self) -> Object:
        return make_job(runPolicy={"stallSeconds": 600, "backoffLimit": 0})

    limit = 600 + MARGIN_SECONDS

    def hears(self, heard: Heard, *, seconds: float = 0) -> Decision:
        job, pod = running(self.job)
        job = after(job, ask(job, pod, heard=Heard(report=make_report(900))))
        return ask(job, pod, heard=heard, seconds=seconds)

    @pytest.mark.parametrize(("more", "rule"), [(-1, "attemptRuns"), (0, "stall")])
    def test_no_sign_of_life_for_longer_than_the_trainers_own_watchdog_allows(self, more: float, rule: str) -> None:
        decision = self.hears(Heard(report=make_report(900, idle_seconds=self.limit + more)))
        assert (decision.rule, bool(decision.delete)) == (rule, rule == "stall")

    @pytest.mark.parametrize(("more", "rule"), [(-1, "attemptRuns"), (0, "stall")])
    def test_one_that_does_not_answer_any_more(self, more: float, rule: str) -> None:
        heard = Heard(report=make_report(900), silent_since=NOW, error="timed out")
        assert self.hears(heard, seconds=self.limit + more).rule == rule

    def test_a_trainer_that_never_answered_may_be_out_of_reach(self) -> None:
        """An operator outside of the cluster, or behind a network policy, kills nobody for that."""
        job, pod = running(self.job)
        assert ask(job, pod, heard=Heard(silent_since=NOW, error="refused"), seconds=100_000).rule == "attemptRuns"

    def test_where_most_do_not_answer_the_operator_blames_itself(self) -> None:
        heard = Heard(report=make_report(900), silent_since=NOW, error="timed out", others_silent=True)
        assert self.hears(heard, seconds=100_000).rule == "attemptRuns"

    def test_a_trainer_that_does_not_say_is_left_alone(self) -> None:
        assert self.hears(Heard(report=make_report(900)), seconds=100_000).rule == "attemptRuns"

    def test_it_ends_as_a_hang_and_backs_off(self) -> None:
        job, pod = running(self.job)
        told = ask(job, pod, heard=Heard(report=make_report(900, idle_seconds=5000)))
        job = after(job, told)
        killed = stopped(job, seconds=120, status=terminated(137))
        decision = ask(job, killed, seconds=121)
        status = decision.status
        assert status is not None
        assert (status.attempts[0].cause, status.attempts[0].exit_code) == ("Hang", 137)
        assert (status.phase, status.next_attempt_at) == ("Interrupted", at(132))
        assert (status.counters.infrastructure, status.counters.failures, status.counters.preemptions) == (1, 0, 0)
        assert "its watchdog has not ended it" in status.attempts[0].message

    def test_done_after_all_is_done(self) -> None:
        job, pod = running(self.job)
        job = after(job, ask(job, pod, heard=Heard(report=make_report(900, idle_seconds=5000))))
        word = last_word(0, step=2000, latest_checkpoint=make_checkpoint(2000))
        decision = ask(job, stopped(job, seconds=20, status=terminated(0, message=word)), seconds=21)
        assert condition(decision, "Complete") == ("True", "Completed")
