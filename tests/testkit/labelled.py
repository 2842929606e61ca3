"""A labelled situation of the corpus of waiting jobs, diagnosed and compared with its label."""

from __future__ import annotations

from typing import Any

from diffusion_operator import timestamps
from diffusion_operator.policies.waiting.diagnosis import explain
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts


def facts_of(case: dict[str, Any]) -> WaitingFacts:
    """Return what the operator is told of the situation."""
    given = case["facts"]
    return WaitingFacts(
        namespace="team-a",
        pods=tuple(given.get("pods", ())),
        wanted=given.get("wanted", 1),
        profile=given["profile"],
        resource=given["resource"],
        capacity=given.get("capacity", "OnDemand"),
        refusal=given.get("refusal", ""),
        events=tuple(given.get("events", ())),
        nodes=tuple(given["nodes"]) if "nodes" in given else None,
        others=tuple(given["others"]) if "others" in given else None,
        job_ends={job: timestamps.from_text(end) for job, end in given.get("jobEnds", {}).items()},
        workload=given.get("workload"),
        queue_position=given.get("queuePosition"),
    )


def diagnose(case: dict[str, Any]) -> Diagnosis:
    """Return what the operator makes of the situation."""
    return explain(facts_of(case), now=timestamps.from_text(case["now"]))


def wrong(case: dict[str, Any], found: Diagnosis) -> list[str]:
    """Return what differs from the label."""
    expected = case["expect"]
    differs = [] if found.cause == expected["cause"] else [f"cause {found.cause} instead of {expected['cause']}"]
    differs += [f"detail lacks {part!r}" for part in expected["detail"] if part.lower() not in found.detail.lower()]
    differs += [f"hint lacks {part!r}" for part in expected["hint"] if part.lower() not in found.hint.lower()]
    return differs
