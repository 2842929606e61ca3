"""Prometheus metrics. What describes jobs is computed from what is known of them at each scrape, and ends with them."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diffusion_api import names
from diffusion_api.status import JobStatus
from diffusion_operator import timestamps
from diffusion_operator.state import Job, Object

LABELS = ("namespace", "name")
DURATIONS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG_DURATIONS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600)
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


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
        self.gpu_seconds = Counter(
            "diffusion_operator_gpu_seconds",
            "GPU-seconds that pods have held, as they are written down.",
            ["namespace", "profile"],
            registry=self.registry,
        )
        self.start_seconds = Histogram(
            "diffusion_operator_attempt_start_seconds",
            "Time from the start of an attempt until all its pods run: queue, nodes, images.",
            ["profile"],
            buckets=LONG_DURATIONS,
            registry=self.registry,
        )
        self.job_seconds = Histogram(
            "diffusion_operator_job_duration_seconds",
            "Time from a job's start until it is complete or has failed for good.",
            ["result"],
            buckets=LONG_DURATIONS,
            registry=self.registry,
        )
        self.active = Gauge(
            "diffusion_operator_active", "1 for the active one of several operators, else 0.", registry=self.registry
        )
        waiting = Gauge("diffusion_operator_queue_depth", "Jobs that wait to be looked at.", registry=self.registry)
        waiting.set_function(lambda: float(depth()))
        self.registry.register(_Jobs(jobs))

    def note(self, job: Job, status: JobStatus) -> None:
        """Count what the written status says that the one before did not."""
        before = {attempt.number for attempt in job.status.attempts if attempt.ended_at}
        for attempt in status.attempts:
            if attempt.ended_at and attempt.number not in before and attempt.number >= job.status.attempt:
                self.attempts.labels(cause=attempt.cause or "Unknown").inc()
        held = {attempt.number: attempt.gpu_seconds for attempt in job.status.attempts}
        for attempt in status.attempts:  # each on the profile that it ran on, which need not be the first of the job's
            more = attempt.gpu_seconds - held.get(attempt.number, 0)
            if more > 0 and attempt.number >= job.status.attempt:
                self.gpu_seconds.labels(namespace=job.namespace, profile=attempt.profile).inc(more)
        ready = _turned_true("PodsReady", job.status, status)
        if ready and status.attempts:
            profile = status.attempts[0].profile
            self.start_seconds.labels(profile=profile).observe(_between(status.attempts[0].started_at, ready))
        for result in ("Complete", "Failed"):
            ended = _turned_true(result, job.status, status)
            if ended and status.start_time:
                self.job_seconds.labels(result=result).observe(_between(status.start_time, ended))

    def request(self, method: str, status: int) -> None:
        """Count a request to the API server."""
        self.requests.labels(method=method, status=str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _turned_true(condition: str, old: JobStatus, new: JobStatus) -> str | None:
    """Return when the condition became true, None unless it did between these two."""
    was, now = (
        {one.type: one.last_transition_time for one in status.conditions if one.status == "True"}
        for status in (old, new)
    )
    return None if condition in was else now.get(condition)


def _between(start: str, end: str) -> float:
    """Return the seconds from one moment to another, 0 where a clock was set back between them."""
    return max(0.0, (timestamps.from_text(end) - timestamps.from_text(start)).total_seconds())


class _Jobs(Collector):
    def __init__(self, jobs: Callable[[], Iterable[Object]]) -> None:
        self._jobs = jobs

    def describe(self) -> list[Metric]:
        """Return nothing: registering must not look at jobs."""
        return []

    def collect(self) -> Iterator[Metric]:
        jobs = list(self._jobs())
        yield _by_phase(jobs)
        families = [
            (GaugeMetricFamily(one.name, one.meaning, labels=(*LABELS, *one.labels)), one.samples) for one in PER_JOB
        ]
        for job in jobs:
            key = (job["metadata"]["namespace"], job["metadata"]["name"])
            for family, samples in families:
                for labels, value in samples(job):
                    family.add_metric((*key, *labels), value)
        for family, _ in families:
            yield family


Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True)
class PerJob:
    """A metric that each job has series of."""

    name: str
    meaning: str
    samples: Callable[[Object], Samples]
    """job -> (values of the further labels, value) of each series; none where there is nothing to say."""
    labels: tuple[str, ...] = ()


def _status(job: Object) -> Object:
    found: Object = job.get("status") or {}
    return found


def _info(job: Object) -> Samples:
    spec = job.get("spec") or {}
    queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL, "")
    asked = (spec.get("model") or {}).get("family") or "Auto"
    family = _status(job).get("architecture") or asked if asked == "Auto" else asked
    yield (spec.get("method", ""), family, _profile(job), queue), 1


def _profile(job: Object) -> str:
    """Return the profile in use: the first that the job asks for, until it was placed elsewhere."""
    asked = ((job.get("spec") or {}).get("resources") or {}).get("profile", "")
    return str((_status(job).get("placement") or {}).get("profile", asked))


def _gpus(job: Object) -> Samples:
    for labels, number in _number("gpus")(job):
        yield (*labels, _profile(job)), number


def _pods(job: Object) -> Samples:
    wanted = ((job.get("spec") or {}).get("resources") or {}).get("nodes", 1)
    for attempt in (_status(job).get("attempts") or ())[:1]:
        nodes = attempt.get("nodes") or ()
        if not attempt.get("endedAt") and len(nodes) == wanted:  # in the order of the ranks once all have one
            for rank, node in enumerate(nodes):
                yield (names.pod_name(job["metadata"]["name"], attempt["number"], rank), str(rank), node), 1


def _time(*path: str) -> Callable[[Object], Samples]:
    """Return the samples of a moment that stands in the job there."""

    def samples(job: Object) -> Samples:
        found: Any = job
        for key in path:
            found = (found or {}).get(key)
        if found:
            yield (), timestamps.from_text(found).timestamp()

    return samples


def _number(*path: str) -> Callable[[Object], Samples]:
    """Return the samples of a number that stands in the status there."""

    def samples(job: Object) -> Samples:
        found: Any = _status(job)
        for key in path:
            found = (found or {}).get(key)
        if found is not None:
            yield (), float(found)

    return samples


def _ratio(job: Object) -> Samples:
    progress = _status(job).get("progress")
    if progress and progress["totalSteps"]:
        yield (), progress["step"] / progress["totalSteps"]


def _restarts(job: Object) -> Samples:
    yield (), (_status(job).get("counters") or {}).get("restarts", 0)


def _pending(job: Object) -> Samples:
    pending = _status(job).get("pending")
    if pending:
        yield (pending["cause"],), timestamps.from_text(pending["since"]).timestamp()


PER_JOB = (
    PerJob(
        "diffusion_job_info",
        "What the job asks for; always 1.",
        _info,
        labels=("method", "family", "profile", "queue"),
    ),
    PerJob(
        "diffusion_job_phase",
        "The job's phase; always 1.",
        lambda job: [((_status(job).get("phase", "Pending"),), 1)],
        labels=("phase",),
    ),
    PerJob("diffusion_job_gpus", "GPUs that the job asks for.", _gpus, labels=("profile",)),
    PerJob(
        "diffusion_job_pod_info",
        "Pods of the running attempt, to join with metrics of pods and GPUs; always 1.",
        _pods,
        labels=("pod", "rank", "node"),
    ),
    PerJob(
        "diffusion_job_created_timestamp_seconds",
        "Time of the job's creation.",
        _time("metadata", "creationTimestamp"),
    ),
    PerJob("diffusion_job_start_timestamp_seconds", "Time when work on it began.", _time("status", "startTime")),
    PerJob(
        "diffusion_job_pending_since_timestamp_seconds",
        "Since when it waits; no series while it does not.",
        _pending,
        labels=("cause",),
    ),
    PerJob("diffusion_job_progress_ratio", "Steps done, 0 to 1.", _ratio),
    PerJob(
        "diffusion_job_last_progress_timestamp_seconds",
        "Time when the trainer last told of progress.",
        _time("status", "progress", "lastUpdatedTime"),
    ),
    PerJob("diffusion_job_restarts", "Attempts after the first.", _restarts),
    PerJob(
        "diffusion_job_last_checkpoint_timestamp_seconds",
        "Time of the newest checkpoint.",
        _time("status", "checkpoint", "latest", "time"),
    ),
    PerJob("diffusion_job_gpu_seconds", "GPU-seconds so far, over all attempts.", _number("accounting", "gpuSeconds")),
    PerJob(
        "diffusion_job_lost_gpu_seconds",
        "GPU-seconds of work that had to be repeated.",
        _number("accounting", "lostGpuSeconds"),
    ),
    PerJob(
        "diffusion_job_goodput_ratio",
        "Share of GPU time that went into steps that were kept, 0 to 1.",
        _number("accounting", "goodput"),
    ),
)


def _by_phase(jobs: list[Object]) -> Metric:
    tally = Tally((job["metadata"]["namespace"], _status(job).get("phase", "Pending")) for job in jobs)
    family = GaugeMetricFamily("diffusion_operator_jobs", "Jobs by phase.", labels=("namespace", "phase"))
    for labels, number in sorted(tally.items()):
        family.add_metric(labels, number)
    return family
