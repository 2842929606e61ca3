"""Prometheus metrics. What describes jobs is computed from what is known of them at each scrape, and ends with them."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diffusion_operator import timestamps
from diffusion_operator.state import Object

LABELS = ("namespace", "name")
DURATIONS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """All metrics of one operator, in a registry of their own."""

    def __init__(self, *, version: str, jobs: Callable[[], Iterable[Object]], depth: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        info = Gauge("diffusion_operator_build_info", "Version; always 1.", ["version"], registry=self.registry)
        info.labels(version=version).set(1)
        self.reconcile_seconds = Histogram(
            "diffusion_operator_reconcile_duration_seconds",
            "Duration of one look at one job.",
            buckets=DURATIONS,
            registry=self.registry,
        )
        self.reconcile_errors = Counter(
            "diffusion_operator_reconcile_errors", "Looks that failed, by error.", ["error"], registry=self.registry
        )
        self.attempts = Counter(
            "diffusion_operator_attempts_ended", "Attempts that ended, by cause.", ["cause"], registry=self.registry
        )
        self.requests = Counter(
            "diffusion_operator_api_requests",
            "Requests to the API server by method and status; 0 without an answer.",
            ["method", "status"],
            registry=self.registry,
        )
        waiting = Gauge("diffusion_operator_queue_depth", "Jobs that wait to be looked at.", registry=self.registry)
        waiting.set_function(lambda: float(depth()))
        self.registry.register(_Jobs(jobs))

    def request(self, method: str, status: int) -> None:
        """Count a request to the API server."""
        self.requests.labels(method=method, status=str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Jobs(Collector):
    def __init__(self, jobs: Callable[[], Iterable[Object]]) -> None:
        self._jobs = jobs

    def describe(self) -> list[Metric]:
        """Return nothing: registering must not look at jobs."""
        return []

    def collect(self) -> Iterator[Metric]:
        jobs = list(self._jobs())
        yield _by_phase(jobs)
        phase = GaugeMetricFamily("diffusion_job_phase", "The job's phase; always 1.", labels=(*LABELS, "phase"))
        ratio = GaugeMetricFamily("diffusion_job_progress_ratio", "Steps done, 0 to 1.", labels=LABELS)
        restarts = GaugeMetricFamily("diffusion_job_restarts", "Attempts after the first.", labels=LABELS)
        saved = GaugeMetricFamily(
            "diffusion_job_last_checkpoint_timestamp_seconds", "Time of the newest checkpoint.", labels=LABELS
        )
        for job in jobs:
            status = job.get("status") or {}
            key = (job["metadata"]["namespace"], job["metadata"]["name"])
            phase.add_metric((*key, status.get("phase", "Pending")), 1)
            restarts.add_metric(key, (status.get("counters") or {}).get("restarts", 0))
            progress = status.get("progress")
            if progress and progress["totalSteps"]:
                ratio.add_metric(key, progress["step"] / progress["totalSteps"])
            latest = (status.get("checkpoint") or {}).get("latest")
            if latest:
                saved.add_metric(key, timestamps.from_text(latest["time"]).timestamp())
        yield from (phase, ratio, restarts, saved)


def _by_phase(jobs: list[Object]) -> Metric:
    tally = Tally((job.get("status") or {}).get("phase", "Pending") for job in jobs)
    family = GaugeMetricFamily("diffusion_operator_jobs", "Jobs by phase.", labels=("phase",))
    for phase, number in sorted(tally.items()):
        family.add_metric((phase,), number)
    return family
