"""Whatever the objects hold: no exception, bounded texts, and the order of facts does not matter."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting.diagnosis import explain
from diffusion_operator.policies.waiting.facts import MAX_TEXT, Diagnosis, WaitingFacts

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
WORDS = st.sampled_from(
    [
        "metadata", "spec", "status", "name", "namespace", "uid", "labels", "nodeName", "conditions", "type", "reason",
        "message", "containers", "resources", "requests", "nvidia.com/gpu", "cpu", "taints", "key", "effect",
        "tolerations",
        "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms",
        "matchExpressions", "operator", "values", "phase", "involvedObject", "kind", "lastTimestamp", "allocatable",
        "containerStatuses", "state", "waiting", "schedulingGates", "nominatedNodeName", "nodeSelector", "volumes",
    ]
)  # fmt: skip
SAID = st.sampled_from(
    [
        "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: none",
        "0/ nodes are available", "9/9 nodes are available: , 1 , 2", "pod didn't trigger scale-up: ",
        "Failed to schedule pod, ;;;", "did not tolerate", "nodeclaim/", "exceeded quota: ", "Pending", "True",
        "Unknown",
        "Ready", "PodScheduled", "FailedMount", "Nominated", "TriggeredScaleUp", "In", "Gt", "Exists", "NoSchedule",
        "2026-03-10T11:59:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1e99", "16Gi", "-1", "²",
        "ImagePullBackOff", "CreateContainerConfigError", "{name} {0} {", "kueue.x-k8s.io/admission", "Pod",
        "NodeClaim",
    ]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | SAID
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | SAID, inner, max_size=6), max_leaves=30
)
OBJECTS = st.lists(ANYTHING, max_size=4).map(tuple)
REAL = [
    yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["facts"]
    for path in sorted((Path(__file__).parent / "corpus").glob("*.yaml"))
    if not path.name.startswith("r-")
]
"""Recorded situations are left out: most of their fields are never looked at, and damage would seldom meet others."""
KEYS = ("pods", "events", "nodes", "others")


def facts(given_: dict[str, Any]) -> WaitingFacts:
    return WaitingFacts(
        pods=tuple(given_.get("pods", ())),
        resource=given_["resource"],
        events=tuple(given_.get("events", ())),
        nodes=tuple(given_["nodes"]) if "nodes" in given_ else None,
        others=tuple(given_["others"]) if "others" in given_ else None,
        workload=given_.get("workload"),
        wanted=given_.get("wanted", 1),
        refusal=given_.get("refusal", ""),
    )


def holds(found: Diagnosis) -> None:
    assert found.cause in WaitingCause
    assert found.detail or found.hint
    assert len(found.detail) <= MAX_TEXT
    assert 0 < len(found.hint) <= MAX_TEXT


@given(
    pods=OBJECTS, events=OBJECTS, nodes=st.none() | OBJECTS, others=st.none() | OBJECTS, workload=ANYTHING, said=SAID
)
@settings(max_examples=60, deadline=None)
def test_arbitrary_objects(pods: Any, events: Any, nodes: Any, others: Any, workload: Any, said: str) -> None:
    given_ = WaitingFacts(
        pods=pods, events=events, nodes=nodes, others=others, workload=workload, resource="nvidia.com/gpu"
    )
    holds(explain(given_, now=NOW))
    holds(explain(WaitingFacts(refusal=said), now=NOW))


def spoil(value: Any, data: st.DataObject) -> Any:
    """Return the object with one part replaced by something else, or gone."""
    if isinstance(value, dict) and value:
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.booleans()):
            return {name: entry for name, entry in value.items() if name != key}
        return value | {key: spoil(value[key], data)}
    if isinstance(value, list) and value:
        index = data.draw(st.integers(0, len(value) - 1))
        return [*value[:index], spoil(value[index], data), *value[index + 1 :]]
    return data.draw(SCALARS | st.just("x" * 3000))


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_real_objects_with_damage(data: st.DataObject) -> None:
    """Real situations of the corpus with up to three fields missing or replaced."""
    damaged = copy.deepcopy(data.draw(st.sampled_from(REAL)))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([key for key in (*KEYS, "workload") if damaged.get(key)] or ["profile"]))
        damaged[key] = spoil(damaged[key], data)
        if key in KEYS and not isinstance(damaged[key], list):
            damaged[key] = [damaged[key]]
    holds(explain(facts(damaged), now=NOW))


REPLACEMENTS: tuple[Any, ...] = (None, True, 7, -1.5, "", "nonsense", [], [None, 3, "x"], {}, {"x": {"y": 1}})
SITUATIONS_PER_FIELD = 4


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value below this one."""
    found = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in found:
        yield (*path, key)
        yield from paths(entry, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    """Return a copy with another value at the path."""
    if not path:
        return by
    other = dict(value) if isinstance(value, dict) else list(value)
    other[path[0]] = replaced(value[path[0]], path[1:], by)
    return other


def test_every_field_with_every_kind_of_value() -> None:
    """Each field that occurs in the corpus, in several situations, holds a value of each JSON type."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for case in REAL:
        for key in (*KEYS, "workload"):
            for path in paths(case.get(key, []), (key,)):
                shape = tuple("*" if isinstance(step, int) else step for step in path)
                seen[shape] += 1
                if seen[shape] > SITUATIONS_PER_FIELD:
                    continue
                for value in REPLACEMENTS:
                    holds(explain(facts(replaced(case, path, value)), now=NOW))
    assert len(seen) > 100


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_order_of_facts_does_not_matter(data: st.DataObject) -> None:
    """Facts of several situations mixed, in two orders."""
    mixed: dict[str, Any] = {"resource": "nvidia.com/gpu", "wanted": 2}
    chosen = data.draw(st.lists(st.sampled_from(REAL), min_size=1, max_size=3))
    for key in KEYS:
        unique = {repr(entry): entry for case in chosen for entry in case.get(key, ())}
        named = {entry.get("metadata", {}).get("name", text): entry for text, entry in unique.items()}
        mixed[key] = list(named.values())
    shuffled = mixed | {key: data.draw(st.permutations(mixed[key])) for key in KEYS}
    assert explain(facts(mixed), now=NOW) == explain(facts(shuffled), now=NOW)


def test_a_naive_clock_is_no_trouble() -> None:
    given_ = next(case for case in REAL if case.get("events"))
    assert explain(facts(given_), now=NOW.replace(tzinfo=None)) == explain(facts(given_), now=NOW)
