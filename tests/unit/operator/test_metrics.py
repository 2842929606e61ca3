"""Metrics: names and labels are an interface, and series of a job end with it."""

import pytest

from diffusion_operator.metrics import Metrics
from testkit.builders import Object, at, make_checkpoint, make_job, make_progress


@pytest.fixture
def jobs() -> list[Object]:
    status = {
        "phase": "Running",
        "counters": {"restarts": 2},
        "progress": make_progress(500).to_json_object(),
        "checkpoint": {"latest": make_checkpoint(400, time=at()).to_json_object()},
    }
    return [make_job(status=status), make_job(name="dogs", uid="2")]


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
        'diffusion_operator_jobs{phase="Pending"} 1.0',
        'diffusion_operator_jobs{phase="Running"} 1.0',
        'diffusion_operator_attempts_ended_total{cause="Preempted"} 1.0',
        'diffusion_operator_reconcile_errors_total{error="UnavailableError"} 1.0',
        'diffusion_operator_api_requests_total{method="GET",status="200"} 1.0',
        "diffusion_operator_queue_depth 4.0",
        'diffusion_job_phase{name="cats",namespace="team-a",phase="Running"} 1.0',
        'diffusion_job_progress_ratio{name="cats",namespace="team-a"} 0.25',
        'diffusion_job_restarts{name="cats",namespace="team-a"} 2.0',
        'diffusion_job_last_checkpoint_timestamp_seconds{name="cats",namespace="team-a"} 1.767323045e+09',
    ],
)
def test_lines(jobs: list[Object], line: str) -> None:
    assert line in text(jobs).splitlines()


def test_series_of_a_job_end_with_it(jobs: list[Object]) -> None:
    assert 'name="cats"' in text(jobs)
    assert 'name="cats"' not in text(jobs[1:])


def test_a_job_without_progress_has_no_ratio(jobs: list[Object]) -> None:
    assert 'diffusion_job_progress_ratio{name="dogs"' not in text(jobs)
