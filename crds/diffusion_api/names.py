"""Every name that more than one module needs, each once: group, labels, annotations, environment, paths, objects."""

from __future__ import annotations

GROUP = "diffusion-operator.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

JOB_KIND = "DiffusionTrainingJob"
JOB_PLURAL = "diffusiontrainingjobs"
JOB_SHORT = "dtj"
PROFILE_KIND = "TrainingProfile"
PROFILE_PLURAL = "trainingprofiles"
PROFILE_SHORT = "tp"

MANAGER = f"{GROUP}/diffusion-operator"
"""The default of `spec.managedBy`: jobs with another value are left alone."""

# Labels of a job's pods.
LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_RANK = f"{GROUP}/rank"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_NAME = "app.kubernetes.io/name"
MANAGED_BY = "diffusion-operator"
TRAINER_APP = "diffusion-trainer"

# Annotations of a job's pods.
ANNOTATION_RUN = f"{GROUP}/run"
"""The RunConfig as JSON; the trainer reads it through the downward API. The API server refuses more than 256 KiB."""
ANNOTATION_DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"

# What pods say to Kueue; docs/reference/kueue.md.
KUEUE_PREFIX = "kueue.x-k8s.io/"
LABEL_QUEUE = f"{KUEUE_PREFIX}queue-name"
"""On the job: its LocalQueue. Passed on to its pods."""
LABEL_QUEUE_PRIORITY = f"{KUEUE_PREFIX}priority-class"
"""On the job: its WorkloadPriorityClass. Passed on to its pods."""
LABEL_POD_GROUP = f"{KUEUE_PREFIX}pod-group-name"
ANNOTATION_POD_GROUP_COUNT = f"{KUEUE_PREFIX}pod-group-total-count"
ANNOTATION_POD_GROUP_ROLE = f"{KUEUE_PREFIX}role-hash"
ANNOTATION_RETRIABLE = f"{KUEUE_PREFIX}retriable-in-group"
FINALIZER_KUEUE = f"{KUEUE_PREFIX}managed"
"""On a pod for as long as Kueue counts on it."""

# The trainer's container.
TRAINER_CONTAINER = "trainer"
METRICS_PORT = 9100
METRICS_PORT_NAME = "metrics"
PROGRESS_PATH = "/progress"
METRICS_PATH = "/metrics"
HEALTH_PATH = "/healthz"
TRAINER_UID = 10001
RENDEZVOUS_PORT = 29500
"""Where the pods of a job with several nodes meet, on rank 0's pod."""
RENDEZVOUS_PORT_NAME = "rendezvous"

# Paths inside the trainer's container.
RUN_DIR = "/etc/diffusion"
RUN_FILE = "run.json"
CREDENTIALS_DIR = "/var/run/secrets/diffusion-operator.io/credentials"
WORK_DIR = "/workspace"
TERMINATION_LOG = "/dev/termination-log"

# Environment of the trainer's container (everything else is in the RunConfig).
ENV_RUN_FILE = "DIFFUSION_RUN_FILE"
ENV_CREDENTIALS_DIR = "DIFFUSION_CREDENTIALS_DIR"
ENV_WORK_DIR = "DIFFUSION_WORK_DIR"
ENV_TERMINATION_LOG = "DIFFUSION_TERMINATION_LOG"
ENV_FAILPOINT = "DIFFUSION_FAILPOINT"
"""Test hook of operator and trainer: `<point>:<n>:<action>`; unset in production."""

# Keys of the Secret that `spec.credentials.secretRef` names; projected as files of the same names.
SECRET_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
)

MAX_JOB_NAME = 50
"""Pods are called `<job>-<attempt>-<rank>` and their name is a host name, at most 63 characters."""


def pod_name(job: str, attempt: int, rank: int) -> str:
    """Return the name of the pod of one rank of one attempt. Deterministic, so that a repeated create is a 409."""
    return f"{job}-{attempt}-{rank}"


def service_name(job: str) -> str:
    """Return the name of the headless Service that gives a job's pods names: `<pod>.<service>`."""
    return job


PREFLIGHT_ATTEMPT = 0
"""Label of a preflight's pods and number in its last word: it comes before the first attempt."""


def preflight_name(job: str, number: int) -> str:
    """Return the name of the pod of a job's preflight; `number` counts tries, from 0."""
    return f"{job}-preflight-{number}" if number else f"{job}-preflight"


def workload_name(job: str, job_uid: str, attempt: int) -> str:
    """Return the name of a job's pod group and of its Kueue Workload; `attempt` is the first one in it.

    At most 63 characters for every number that is ever reached; the uid tells a job from an earlier one of its name.
    """
    return f"{job[:40].rstrip('-')}-{job_uid[:8]}-{attempt}"


def checkpoint_prefix(job_uid: str) -> str:
    """Return the prefix, below the output destination, of a job's resumable state. Ends with a slash."""
    return f"checkpoints/{job_uid}/"


CACHE_PREFIX = "cache/"
"""Prefix, below the output destination, of cached latents and text embeddings: content-addressed."""
EXPORT_DIFFUSERS = "diffusers/"
EXPORT_KOHYA = "kohya/"
EXPORT_SINGLE_FILE = "single-file/"
SAMPLES_PREFIX = "samples/"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
LOGS_PREFIX = "logs/"


def attempt_logs(job_uid: str, attempt: int) -> str:
    """Return the prefix, below the output destination, of a failed attempt's logs, `rank-<n>.log`. Ends in a slash."""
    return f"{LOGS_PREFIX}{job_uid}/attempt-{attempt}/"
