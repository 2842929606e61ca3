"""One job's whole life on a real API server, told step by step, and what is left of it: for comparing lives.

Whatever happens to the operator or to its requests meanwhile, the life must end in the same state, with the same
events, and with each pod created exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from testkit.builders import last_word, make_job
from testkit.kube import Object, condition
from testkit.operating import Installation, Kubelet, User
from testkit.waiting import wait_until

EVENTS = [
    "AttemptStarted", "AttemptStarted", "Complete", "Preempted", "PreflightPassed", "Running", "Running", "Validated",
]  # fmt: skip
WRITES = ("create", "update", "delete")
_TIMES = ("At", "Time", "time", "since", "Since")
"""Ends of the names of fields that hold times."""


@dataclass(frozen=True)
class Life:
    """What is left of a job's life."""

    final: Object
    """The status without times, and the pods that are kept."""
    events: list[str]
    created: dict[str, int]
    """How often each pod was created, by the API server's own log."""
    writes: int
    """Writes that the API server answered with success."""


def live(
    installation: Installation,
    namespace: str,
    *,
    look_after: Callable[[], None] = lambda: None,
    at: Callable[[str], None] = lambda _milestone: None,
    detail: Callable[[], str] | None = None,
    patience_seconds: float = 60,
) -> Life:
    """Let a job live: pass the preflight, start, run, be preempted, run again, complete. An operator must be there.

    `look_after` is called again and again while something is waited for; `at` with each milestone when it is reached.
    `patience_seconds` is for each milestone.
    """
    user, kubelet = User(installation.kube, namespace), Kubelet(installation.kube, namespace)
    user.create(make_job())

    def wait(what: str, probe: Callable[[], Any]) -> None:
        def look() -> bool:
            look_after()
            return bool(probe())

        wait_until(look, describe=what, timeout=patience_seconds, detail=detail)
        at(what)

    def settled(phase: str, reason: str, attempt: int, *events: str) -> bool:
        status = user.job().get("status", {})
        ready = next((c["reason"] for c in status.get("conditions", []) if c["type"] == "PodsReady"), "")
        seen = Counter(user.reasons())
        wanted = all(seen[event] >= events.count(event) for event in events)
        return (status.get("phase"), ready, status.get("attempt")) == (phase, reason, attempt) and wanted

    wait("the preflight's pod", lambda: settled("Preflight", "", 0, "Validated"))
    kubelet.run("cats-preflight")
    wait("the preflight", lambda: condition(user.job(), "PreflightPassed").get("reason") == "Running")
    kubelet.end("cats-preflight", 0, message=last_word(0, attempt=0))
    wait("the first pod", lambda: settled("Scheduling", "Waiting", 1, "PreflightPassed", "AttemptStarted"))
    # One step at a time, each awaited, so that every life makes the same writes.
    kubelet.wait_for_pod("cats-1-0")
    kubelet.bind("cats-1-0")
    wait("the first node", lambda: settled("Preparing", "Waiting", 1))
    kubelet.run("cats-1-0")
    wait("the first run", lambda: settled("Preparing", "Running", 1, "Running"))
    kubelet.end("cats-1-0", 75, message=last_word(75, step=700))
    again = ("Preempted", "AttemptStarted", "AttemptStarted")
    wait("the second pod", lambda: settled("Scheduling", "Waiting", 2, *again))
    kubelet.wait_for_pod("cats-2-0")
    kubelet.bind("cats-2-0")
    wait("the second node", lambda: settled("Preparing", "Waiting", 2))
    kubelet.run("cats-2-0")
    wait("the second run", lambda: settled("Preparing", "Running", 2, "Running", "Running"))
    kubelet.end("cats-2-0", 0, message=last_word(0, attempt=2, step=2000))
    wait("the end", lambda: settled("Complete", "AttemptEnded", 2, "Complete"))
    wait("tidying up", lambda: pods(installation, namespace) == ["cats-2-0"])
    return remember(installation, namespace)


def pods(installation: Installation, namespace: str) -> list[str]:
    """Return the names of the pods that there are."""
    return [pod["metadata"]["name"] for pod in installation.kube.items("pods", namespace=namespace)]


def remember(installation: Installation, namespace: str) -> Life:
    """Return what is left of the life of the namespace's job."""
    user = User(installation.kube, namespace)
    log = installation.audit(namespace, verbs=WRITES)
    done = [entry for entry in log if entry["responseStatus"]["code"] < 300]
    created = Counter(
        entry["objectRef"]["name"]
        for entry in done
        if (entry["verb"], entry["objectRef"]["resource"]) == ("create", "pods")
    )
    final = {"status": timeless(user.job()["status"]), "pods": pods(installation, namespace)}
    return Life(final=final, events=user.reasons(), created=created, writes=len(done))


def timeless(value: Any) -> Any:
    """Return a status without its times."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.endswith(_TIMES)}
    return [timeless(item) for item in value] if isinstance(value, list) else value
