"""Metrics: names and labels are an interface, and series of a job end with it."""

import itertools

import pytest

from diffusion_operator.metrics import Metrics
from diffusion_operator.state import Job
from testkit.builders import Object, at, make_checkpoint, make_job, make_progress


@pytest.fixture
def jobs() -> list[Object]:
    status = {
        "phase": "Running",
        "counters": {"restarts": 2},
        "progress": make_progress(500).to_json_object(),
        "checkpoint": {"latest": make_checkpoint(400, time=at()).to_json_object()},
        "startTime": at(),
        "gpus": 4,
        "accounting": {"gpuSeconds": 360.5, "lostGpuSeconds": 12.5, "goodput": 0.9},
    }
    metadata = {"creationTimestamp": at(-10), "labels": {"kueue.x-k8s.io/queue-name": "gold"}}
    pending = {"cause": "NodeFull", "detail": "", "hint": "", "since": at(5)}
    dogs = make_job(name="dogs", uid="2", status={"phase": "Scheduling", "pending": pending})
    return [
        make_job(status=status, metadata=metadata, model={"family": "SD1"}, resources={"profile": "a100"}),
        dogs,
        make_job(name="eels", uid="3"),
    ]


def text(jobs: list[Object]) -> str:
    metrics = Metrics(version="1.2.3", jobs=lambda: jobs, depth=lambda: 4)
    metrics.request("GET", 200)
    metrics.attempts.labels(cause="Preempted").inc()
    metrics.reconcile_errors.labels(error="UnavailableError").inc()
    return metrics.text().decode()


@pytest.mark.parametrize(
    "line",
    [
        'diffusion_operator_build_info{version="1.2.3"} 1.0',
        'diffusion_operator_jobs{namespace="team-a",phase="Pending"} 1.0',
        'diffusion_operator_jobs{namespace="team-a",phase="Running"} 1.0',
        'diffusion_operator_attempts_ended_total{cause="Preempted"} 1.0',
        'diffusion_operator_reconcile_errors_total{error="UnavailableError"} 1.0',
        'diffusion_operator_api_requests_total{method="GET",status="200"} 1.0',
        "diffusion_operator_queue_depth 4.0",
        'diffusion_job_phase{name="cats",namespace="team-a",phase="Running"} 1.0',
        'diffusion_job_progress_ratio{name="cats",namespace="team-a"} 0.25',
        'diffusion_job_restarts{name="cats",namespace="team-a"} 2.0',
        'diffusion_job_last_checkpoint_timestamp_seconds{name="cats",namespace="team-a"} 1.767323045e+09',
        'diffusion_job_last_progress_timestamp_seconds{name="cats",namespace="team-a"} 1.767323045e+09',
        'diffusion_job_start_timestamp_seconds{name="cats",namespace="team-a"} 1.767323045e+09',
        'diffusion_job_created_timestamp_seconds{name="cats",namespace="team-a"} 1.767323035e+09',
        'diffusion_job_info{family="SD1",method="LoRA",name="cats",namespace="team-a",profile="a100",queue="gold"} 1.0',
        'diffusion_job_gpus{name="cats",namespace="team-a",profile="a100"} 4.0',
        'diffusion_job_gpu_seconds{name="cats",namespace="team-a"} 360.5',
        'diffusion_job_lost_gpu_seconds{name="cats",namespace="team-a"} 12.5',
        'diffusion_job_goodput_ratio{name="cats",namespace="team-a"} 0.9',
        'diffusion_job_pending_since_timestamp_seconds{cause="NodeFull",name="dogs",namespace="team-a"} 1.76732305e+09',
        'diffusion_job_phase{name="dogs",namespace="team-a",phase="Scheduling"} 1.0',
        "diffusion_operator_active 0.0",
    ],
)
def test_lines(jobs: list[Object], line: str) -> None:
    assert line in text(jobs).splitlines()


def test_series_of_a_job_end_with_it(jobs: list[Object]) -> None:
    assert 'name="cats"' in text(jobs)
    assert 'name="cats"' not in text(jobs[1:])


def test_a_job_without_progress_has_no_ratio(jobs: list[Object]) -> None:
    assert 'diffusion_job_progress_ratio{name="dogs"' not in text(jobs)
    assert 'diffusion_job_pending_since_timestamp_seconds{cause="",name="eels"' not in text(jobs)


def test_what_a_written_status_says_is_counted_once() -> None:
    metrics = Metrics(version="1", jobs=list, depth=lambda: 0)

    def status(phase: str, seconds: float, **conditions: float) -> Object:
        attempt: Object = {"number": 1, "startedAt": at(10), "profile": "rtx-4090", "gpuSeconds": seconds}
        if phase == "Complete":
            attempt |= {"endedAt": at(3700), "cause": "Completed"}
        return {
            "phase": phase,
            "startTime": at(),
            "attempt": 1,
            "attempts": [attempt],
            "accounting": {"gpuSeconds": 7000 + seconds},
            "conditions": [
                {"type": name, "status": "True", "reason": "R", "message": "", "lastTransitionTime": at(when)}
                for name, when in conditions.items()
            ],
        }

    steps = [
        status("Scheduling", 0),
        status("Running", 100, PodsReady=52),
        status("Running", 300, PodsReady=52),
        status("Complete", 3650, Complete=3700),
        status("Complete", 3650, Complete=3700),
    ]
    for before, after in itertools.pairwise(steps):
        metrics.note(Job.read(make_job(status=before)), Job.read(make_job(status=after)).status)
    lines = metrics.text().decode().splitlines()
    assert 'diffusion_operator_gpu_seconds_total{namespace="team-a",profile="rtx-4090"} 3650.0' in lines
    assert 'diffusion_operator_attempt_start_seconds_sum{profile="rtx-4090"} 42.0' in lines
    assert 'diffusion_operator_attempt_start_seconds_count{profile="rtx-4090"} 1.0' in lines
    assert 'diffusion_operator_job_duration_seconds_sum{result="Complete"} 3700.0' in lines
    assert 'diffusion_operator_job_duration_seconds_count{result="Complete"} 1.0' in lines
    assert 'diffusion_operator_attempts_ended_total{cause="Completed"} 1.0' in lines


def test_pods_of_the_running_attempt_can_be_joined_with_their_gpus() -> None:
    attempt = {"number": 3, "startedAt": at(), "nodes": ["n7", "n4"]}
    placement = {"profile": "rtx-4090", "capacity": "Spot", "since": at(), "waitsSince": at(), "reason": "NoCapacity"}
    status = {"attempts": [attempt], "gpus": 2, "placement": placement, "architecture": "SDXL"}
    lines = text([make_job(status=status, resources={"nodes": 2})]).splitlines()
    for rank, node in enumerate(attempt["nodes"]):
        series = f'name="cats",namespace="team-a",node="{node}",pod="cats-3-{rank}",rank="{rank}"'
        assert f"diffusion_job_pod_info{{{series}}} 1.0" in lines
    assert 'diffusion_job_gpus{name="cats",namespace="team-a",profile="rtx-4090"} 2.0' in lines
    assert any('family="SDXL"' in line and 'profile="rtx-4090"' in line for line in lines)
    over = {"attempts": [attempt | {"endedAt": at(9), "cause": "Preempted"}]}
    assert "diffusion_job_pod_info{" not in text([make_job(status=over)])
