"""The values of one look at a job: what was seen (`Observed`), the question (`Case`), the answer (`Decision`).

Everything is frozen and built from the cluster alone; nothing reads a clock or the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from diffusion_api import names
from diffusion_api.job import JobSpec
from diffusion_api.outcomes import ExitCode
from diffusion_api.resources import Capacity
from diffusion_api.run import LastWord, ProgressReport
from diffusion_api.status import Attempt, Condition, JobStatus
from diffusion_api.training_profile import ProfileSpec
from diffusion_api.validate import InvalidJobError, parse
from diffusion_operator import timestamps
from diffusion_operator.node_state import QUIET, NodeState

Object = dict[str, Any]
"""A Kubernetes object as plain JSON values."""

STUCK_SECONDS = 30
"""Seconds past the end of a pod's grace after which its node must have stopped answering."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it was read."""

    raw: Object
    spec: JobSpec | None
    """None where it cannot be run."""
    problems: tuple[str, ...] = ()
    """Why it cannot be run, one sentence each."""
    status: JobStatus

    @classmethod
    def read(cls, raw: Object) -> Job:
        """Return the job; a spec that cannot be run is no error but a finding."""
        # Fields of the status that a newer version wrote are not ours to judge.
        status = JobStatus.model_validate(raw.get("status") or {}, extra="ignore")
        try:
            return cls(raw=raw, spec=parse(raw), status=status)
        except InvalidJobError as error:
            return cls(raw=raw, spec=None, problems=tuple(str(problem) for problem in error.problems), status=status)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Its metadata."""
        found: Mapping[str, Any] = self.raw["metadata"]
        return found

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.metadata["name"])

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return str(self.metadata["namespace"])

    @property
    def uid(self) -> str:
        """Its uid."""
        return str(self.metadata["uid"])

    @property
    def generation(self) -> int:
        """Number of the spec's version."""
        return int(self.metadata.get("generation", 0))

    def condition(self, kind: str) -> Condition | None:
        """Return the condition of that type."""
        return next((found for found in self.status.conditions if found.type == kind), None)

    def holds(self, kind: str) -> bool:
        """Return whether the condition is true."""
        found = self.condition(kind)
        return found is not None and found.status == "True"

    @property
    def expected_end(self) -> datetime | None:
        """When it expects to be done, by its last report; None where it does not run or cannot tell."""
        progress = self.status.progress
        if progress is None or progress.estimated_remaining_seconds is None or not self.holds("PodsReady"):
            return None
        said_at = timestamps.from_text(progress.last_updated_time)
        return said_at + timedelta(seconds=progress.estimated_remaining_seconds)

    @property
    def finished(self) -> bool:
        """Whether it is complete or failed, for ever."""
        return self.holds("Complete") or self.holds("Failed")

    @property
    def open_attempt(self) -> Attempt | None:
        """The attempt that was started and has not ended."""
        newest = self.status.attempts[0] if self.status.attempts else None
        return newest if newest is not None and newest.ended_at is None else None


@dataclass(frozen=True)
class SeenPod:
    """A pod of the job: as it is, or, when it is gone, as it was last seen."""

    raw: Object
    gone: bool = False
    node_state: NodeState = QUIET
    """What there is to say of its node."""

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.raw["metadata"]["name"])

    @property
    def attempt(self) -> int:
        """Number of its attempt; 0 where the label is missing or no number."""
        text = self.raw["metadata"].get("labels", {}).get(names.LABEL_ATTEMPT, "")
        return int(text) if text.isdigit() else 0

    @property
    def rank(self) -> int:
        """Its rank within its attempt; 0 where the label is missing or no number."""
        text = self.raw["metadata"].get("labels", {}).get(names.LABEL_RANK, "")
        return int(text) if text.isdigit() else 0

    @property
    def phase(self) -> str:
        """Pending, Running, Succeeded, Failed or Unknown."""
        return str(self._status.get("phase", "Pending"))

    @property
    def reason(self) -> str:
        """Why the pod as a whole is in its phase, e.g. Evicted."""
        return str(self._status.get("reason") or "")

    @property
    def message(self) -> str:
        """The same in words."""
        return str(self._status.get("message") or "")

    @property
    def node(self) -> str:
        """Name of its node; empty before it is scheduled."""
        return str(self.raw["spec"].get("nodeName") or "")

    @property
    def address(self) -> str:
        """Its IP address; empty before it has one."""
        return str(self._status.get("podIP") or "")

    @property
    def deleting(self) -> bool:
        """Whether somebody asked for its deletion."""
        return "deletionTimestamp" in self.raw["metadata"]

    @property
    def finished(self) -> bool:
        """Whether its container has ended for good."""
        return self.phase in {"Succeeded", "Failed"}

    @property
    def waits_on_its_node(self) -> bool:
        """Whether it has a node and does not run yet."""
        return not self.gone and not self.deleting and self.phase == "Pending" and bool(self.node)

    @property
    def unschedulable(self) -> bool:
        """Whether the scheduler has tried and found no node. A gated pod has not been tried."""
        waits = not self.gone and not self.deleting and not self.node
        return waits and self.condition("PodScheduled").get("reason") == "Unschedulable"

    @property
    def gated(self) -> bool:
        """Whether Kueue holds it back."""
        gates = self.raw["spec"].get("schedulingGates") or ()
        return not self.gone and any(gate["name"].startswith(names.KUEUE_PREFIX) for gate in gates)

    @property
    def held(self) -> bool:
        """Whether Kueue counts on it, and keeps its object until it does not any more."""
        return not self.gone and names.FINALIZER_KUEUE in (self.raw["metadata"].get("finalizers") or ())

    @property
    def group(self) -> str:
        """Its pod group in Kueue, which is the name of its Workload; empty without one."""
        return str(self.raw["metadata"].get("labels", {}).get(names.LABEL_POD_GROUP, ""))

    @property
    def disruption(self) -> Mapping[str, Any]:
        """What was announced of its disruption, by Kubernetes or by Kueue; empty where nothing was."""
        found = (self.condition(kind) for kind in ("DisruptionTarget", "TerminationTarget"))
        return next((condition for condition in found if condition.get("status") == "True"), {})

    def condition(self, kind: str) -> Mapping[str, Any]:
        """Return the condition of that type; empty where it has none."""
        found: list[Mapping[str, Any]] = self._status.get("conditions") or []
        return next((entry for entry in found if entry.get("type") == kind), {})

    @property
    def terminated(self) -> Mapping[str, Any]:
        """How the trainer's container ended; empty while it has not."""
        found: Mapping[str, Any] = self._container.get("state", {}).get("terminated") or {}
        return found

    @property
    def waiting(self) -> Mapping[str, Any]:
        """Why the trainer's container has not started; empty where it has."""
        found: Mapping[str, Any] = self._container.get("state", {}).get("waiting") or {}
        return found

    @property
    def started_at(self) -> str | None:
        """When its node took it up."""
        return self._status.get("startTime")

    def stuck(self, now: datetime) -> bool:
        """Return whether it should have been gone for a while: its node has stopped answering.

        A deletion's timestamp is the end of the grace, not its beginning. That a new attempt starts beside such a pod
        is safe: checkpoints are fenced.
        """
        if not self.deleting or self.gone or not self.node:
            return False
        deadline = timestamps.from_text(self.raw["metadata"]["deletionTimestamp"])
        return now >= deadline + timedelta(seconds=STUCK_SECONDS)

    def lost(self, now: datetime) -> bool:
        """Return whether its node is lost, whatever became of the pod there.

        That the next attempt starts beside it is safe: the checkpoints are fenced. Its object is deleted with its
        grace and not by force, so that a node that comes back ends the pod properly before the object goes.
        """
        return self.node_state.is_lost(now)

    def ended(self, now: datetime) -> bool:
        """Return whether nothing more is to be expected of it."""
        # Of one without a node only a finalizer keeps the object: it will never run.
        unplaced = self.deleting and not self.node
        return self.gone or self.finished or unplaced or self.stuck(now) or self.lost(now)

    def live(self, now: datetime) -> bool:
        """Return whether it may still run."""
        return not self.ended(now)

    @cached_property
    def last_word(self) -> LastWord | None:
        """Its termination message; None where there is none, or it is of another attempt or no JSON of ours."""
        text = self.terminated.get("message") or ""
        try:
            word = LastWord.model_validate_json(text, extra="ignore")
        except ValidationError:
            return None
        return word if word.attempt == self.attempt else None

    @property
    def said_code(self) -> int:
        """The exit code that the trainer meant: a SIGKILL after its last word does not change what it said."""
        return self.last_word.exit_code if self.last_word is not None else int(self.terminated.get("exitCode", -1))

    @property
    def completed(self) -> bool:
        """Whether its trainer has done everything."""
        return self.said_code == ExitCode.DONE

    @property
    def _status(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.raw.get("status") or {}
        return found

    @property
    def _container(self) -> Mapping[str, Any]:
        found: list[Mapping[str, Any]] = self._status.get("containerStatuses") or []
        return next((entry for entry in found if entry.get("name") == names.TRAINER_CONTAINER), {})


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What the trainer last said of its progress."""

    report: ProgressReport | None = None
    silent_since: datetime | None = None
    """Since when it has not answered; None where it does."""
    error: str = ""
    """Why it could not be heard."""
    others_silent: bool = False
    """Whether most of the trainers that are asked do not answer either: then it is the way to them that fails."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The API server's answer to the last attempt to create a pod, where it was no."""

    cause: str
    detail: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The rest of the cluster, as far as it explains why pods wait. None is what the operator may not read."""

    nodes: tuple[Object, ...] | None = None
    pods: tuple[Object, ...] | None = None
    """Everybody's pods that have a node."""
    claim_events: tuple[Object, ...] = ()
    """Events about machines that could not be had."""
    job_ends: Mapping[str, datetime] = field(default_factory=dict)
    """When jobs expect to end, by `namespace/name`."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything that was seen of one job, besides the job."""

    trainer_image: str
    """The operator's default image."""
    preflight: bool = False
    """Whether jobs are looked at before their first attempt."""
    pods: tuple[SeenPod, ...] = ()
    profile: Object | None = None
    """The job's first profile, as it is now."""
    alternatives: Mapping[str, Object] = field(default_factory=dict)
    """The profiles of its alternatives by name, as they are now; those that are missing are missing here."""
    profile_names: tuple[str, ...] = ()
    """Names of all profiles, for `did you mean`."""
    pod_events: tuple[Object, ...] = ()
    """Events about pods that wait."""
    around: Surroundings | None = None
    """Looked at only while a pod finds no node."""
    workloads: tuple[Object, ...] | None = None
    """Kueue's Workloads of the job's namespace; None where nobody asked, or without Kueue or the right to list them."""
    heard: Heard = field(default_factory=Heard)
    refusal: Refusal | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question: what is to be done, now, about this job that looks like this."""

    job: Job
    seen: Observed
    now: datetime
    status_seconds: float = 15
    """Least seconds between two writes that only report progress."""

    @property
    def status(self) -> JobStatus:
        """The status as it is."""
        return self.job.status

    @property
    def spec(self) -> JobSpec:
        """The spec; only for policies behind the one that refuses invalid jobs."""
        if self.job.spec is None:
            raise ValueError(f"job {self.job.name} is invalid and got past the validation policy")
        return self.job.spec

    @cached_property
    def snapshots(self) -> Mapping[str, ProfileSpec]:
        """The profiles of all choices as they were at the first attempt, by name; empty before it."""
        found = self.status.profiles or {}
        return {name: ProfileSpec.model_validate(content, extra="ignore") for name, content in found.items()}

    def offered(self, name: str) -> ProfileSpec:
        """Return the snapshot of a profile or, before the first attempt, the profile as it is now.

        Raises:
            ValidationError: it is no profile; the policy for profiles refuses such a one.
        """
        if name in self.snapshots:
            return self.snapshots[name]
        raw = self.seen.profile if name == self.spec.resources.profile else self.seen.alternatives.get(name)
        return ProfileSpec.model_validate((raw or {}).get("spec") or {}, extra="ignore")

    @property
    def profile_name(self) -> str:
        """Name of the profile in use: the first choice before the first attempt."""
        return self.status.placement.profile if self.status.placement else self.spec.resources.profile

    @property
    def profile(self) -> ProfileSpec:
        """The profile in use; see `offered`."""
        return self.offered(self.profile_name)

    @property
    def capacity(self) -> Capacity:
        """Kind of node in use; before the first attempt what the job asks for first."""
        return self.status.placement.capacity if self.status.placement else self.spec.resources.capacity

    @property
    def processes(self) -> int:
        """Training processes over all pods; with GPUs, one for each."""
        return self.spec.resources.nodes * self.spec.resources.gpus_per_node

    @property
    def gpus(self) -> int:
        """GPUs that the job asks for, over all nodes; 0 where the profile has none."""
        return self.processes if self.profile.resource_name else 0

    def pods_of(self, attempt: int) -> tuple[SeenPod, ...]:
        """Return the pods of one attempt, by rank."""
        found = (pod for pod in self.seen.pods if pod.attempt == attempt)
        return tuple(sorted(found, key=lambda pod: pod.rank))

    @property
    def live_pods(self) -> tuple[SeenPod, ...]:
        """Pods that may still run."""
        return tuple(pod for pod in self.seen.pods if pod.live(self.now))


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A change to a pod's metadata, merged into it."""

    pod: SeenPod
    metadata: Object


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done, in this order: write the status, delete pods, create pods, tell Kueue; or delete the job."""

    rule: str
    """Name of the policy that decided."""
    status: JobStatus | None = None
    """The whole new status; None leaves it as it is."""
    delete: tuple[SeenPod, ...] = ()
    create: tuple[Object, ...] = ()
    mark: tuple[Mark, ...] = ()
    leave: tuple[str, ...] = ()
    """Kueue's Workloads to delete: places in queues that are given back."""
    again_seconds: float | None = None
    """Look again after so many seconds, even if nothing happens; None waits for the next event."""
    poll: SeenPod | None = None
    """The pod to ask for progress."""
    delete_job: bool = False
    """Delete the job itself; its pods go with it."""
