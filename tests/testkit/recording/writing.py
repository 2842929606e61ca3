"""Writing a situation down as the corpus has it: what the operator would know, without what is random or long."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from diffusion_api import names
from diffusion_operator import surroundings, timestamps
from testkit import tools
from testkit.kube import Object
from testkit.recording.plant import NAMESPACE
from testkit.recording.situation import Situation
from testkit.recording.stage import Stage

CORPUS = Path(__file__).resolve().parents[2] / "unit" / "operator" / "waiting" / "corpus"
_TOOLS = {"Kubernetes": "kube-scheduler", "kwok": "kwok", "Kueue": "kueue"}
SOURCE = "recorded: " + ", ".join(f"{name} {tools.TOOLS[tool].version}" for name, tool in _TOOLS.items())
SET = "recorded"
_EVENT = ("reason", "message", "type", "count", "source", "reportingComponent", "series")
_TIMES = ("firstTimestamp", "lastTimestamp", "eventTime")


def facts(stage: Stage) -> Object:
    """Return what the operator would know of the job, read as it reads it."""
    kube, profile = stage.kube, stage.profile
    assert profile is not None
    own = stage.found()
    uids = {entry["metadata"]["uid"]: f"uid-{entry['metadata']['name']}" for entry in own}
    every = kube.api.items("pods", query={"fieldSelector": surroundings.PLACED_PODS})
    found: Object = {
        "pods": [_pod(entry) for entry in own],
        "wanted": stage.wanted,
        "profile": stage.profile_name,
        "resource": profile.resource_name,
        "capacity": stage.capacity,
        "events": _events(kube.items("events", namespace=NAMESPACE), set(stage.pods)),
        "nodes": [surroundings.node(entry) for entry in kube.items("nodes")],
        "others": [surroundings.placed_pod(entry) for entry in every if entry["metadata"]["uid"] not in uids],
    }
    if stage.refusal:
        found["refusal"] = stage.refusal
    if stage.workload:
        workload = kube.find("workloads", stage.workload, namespace=NAMESPACE)
        found["workload"] = surroundings.workload(workload) if workload else None
    for entry in (*found["others"], found.get("workload") or {}):
        metadata = entry.get("metadata", {})
        uids |= {metadata["uid"]: f"uid-{metadata['name']}"} if metadata else {}
    renamed: Object = _renamed(found, uids)
    return renamed


def case(situation: Situation, stage: Stage) -> Object:
    """Return the situation with its label."""
    return {
        "situation": situation.tells,
        "source": SOURCE,
        "set": SET,
        "now": timestamps.to_text(datetime.now(UTC)),
        "facts": facts(stage),
        "expect": {"cause": situation.cause, "detail": list(situation.detail), "hint": list(situation.hint)},
    }


def write(situation: Situation, stage: Stage, *, folder: Path = CORPUS) -> Path:
    """Write the situation into its file."""
    path = folder / f"r-{situation.name}.yaml"
    path.write_text(yaml.safe_dump(case(situation, stage), sort_keys=False, width=120, allow_unicode=True))
    return path


def _pod(raw: Object) -> Object:
    metadata = {key: value for key, value in raw["metadata"].items() if key not in {"managedFields", "resourceVersion"}}
    # The whole job once more, for the trainer.
    kept = {key: value for key, value in metadata["annotations"].items() if key != names.ANNOTATION_RUN}
    return {"apiVersion": "v1", "kind": "Pod", **raw, "metadata": {**metadata, "annotations": kept}}


def _events(raw: list[Object], pods: set[str]) -> list[Object]:
    """Return the events about these pods; who exactly reported them is the machine's name."""
    found = []
    for event in raw:
        about = event["involvedObject"]
        if about["kind"] != "Pod" or about["name"] not in pods:
            continue
        reference = {key: about[key] for key in ("kind", "namespace", "name", "uid")}
        kept = {key: event[key] for key in (*_EVENT, *_TIMES) if event.get(key) is not None}
        if "source" in kept:
            kept["source"] = {key: value for key, value in kept["source"].items() if key != "host"}
        metadata = {key: event["metadata"][key] for key in ("namespace", "creationTimestamp")}
        found.append({"apiVersion": "v1", "kind": "Event", "metadata": metadata, "involvedObject": reference, **kept})
    return sorted(found, key=lambda event: (event["metadata"]["creationTimestamp"], event["involvedObject"]["name"]))


def _renamed(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(inner, known) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, known) for inner in value]
    return known.get(value, value) if isinstance(value, str) else value
