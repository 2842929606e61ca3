"""The nodes as the pod sees them: those with the resource, with its labels, tolerated, well, and with room."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting import crowding, messages, nodes, occupancy, reading
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts, diagnosis
from diffusion_operator.policies.waiting.messages import Reason

SHOWN = 3
"""So many nodes or values are named in a sentence."""

NEW = timedelta(minutes=10)
"""A node that has just come needs so long until driver and device plugin run and it reports its GPUs."""

HOSTNAME = "kubernetes.io/hostname"
"""The label by which an attempt avoids nodes on which one before it failed."""

_C = WaitingCause


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """All nodes, sieved step by step."""

    facts: WaitingFacts
    pod: Any
    now: datetime
    selective: bool
    """Whether the pod asks for labels at all."""
    offering: list[Any]
    """Nodes with the resource."""
    labelled: list[Any]
    """Nodes with the labels, with or without the resource."""
    both: list[Any]
    """Nodes with labels and resource."""
    fitting: list[Any]
    """Of those, the ones without taints of somebody's own that the pod does not tolerate."""
    well: list[Any]
    """Of those, the ones that are ready and not about to leave."""

    @property
    def pools(self) -> frozenset[str]:
        """Karpenter's NodePools of the nodes that fit."""
        return frozenset(reading.text(node, "metadata", "labels", "karpenter.sh/nodepool") for node in self.fitting)


def survey(facts: WaitingFacts, pod: Any, *, now: datetime) -> Landscape | None:
    """Return the nodes as the pod sees them; None where they are not known."""
    if facts.nodes is None:
        return None
    known = sorted((node for node in facts.nodes if isinstance(node, dict)), key=reading.name)
    labelled = [node for node in known if nodes.matches(pod, node)]
    both = [node for node in labelled if occupancy.offers(node, facts.resource)]
    fitting = [node for node in both if not _own_taints(pod, node)]
    return Landscape(
        facts=facts,
        pod=pod,
        now=now,
        selective=bool(reading.mapping(pod, "spec", "nodeSelector") or reading.mapping(pod, "spec", "affinity")),
        offering=[node for node in known if occupancy.offers(node, facts.resource)],
        labelled=labelled,
        both=both,
        fitting=fitting,
        well=[node for node in fitting if nodes.ready(node) and not nodes.untolerated(pod, node)],
    )


def _own_taints(pod: Any, node: Any) -> list[str]:
    """Return the untolerated taints that somebody has set on purpose: not those of a node's state."""
    states = nodes.NOT_READY | nodes.LEAVING | nodes.COMING
    return [taint for taint in nodes.untolerated(pod, node) if not nodes.is_among(taint, states)]


def why_no_room(land: Landscape) -> Diagnosis | None:
    """Return why no node takes the pod; None where one seems to have room."""
    for rule in (_none_offers, _labels, _taints, _states):
        found = rule(land)
        if found is not None:
            return found
    return crowding.why_crowded(land.facts, land.pod, land.well)


def _none_offers(land: Landscape) -> Diagnosis | None:
    if land.both:
        return None
    resource = land.facts.resource or "cpu"
    if land.selective and land.labelled:
        return _none_reported(land, resource)
    if land.offering:
        return None
    detail = f"none of {len(land.facts.nodes or ())} nodes has {resource}"
    return diagnosis(_C.NO_SUCH_NODE, detail, resource=resource)


def _none_reported(land: Landscape, resource: str) -> Diagnosis:
    """Return why nodes with the labels do not report the resource: they are new, not well, or lack a driver."""
    new = [node for node in land.labelled if land.now - nodes.created(node) < NEW]
    if new:
        return diagnosis(_C.NODE_PROVISIONING, f"node {_named(new)} is new and does not report {resource} yet")
    well = [node for node in land.labelled if nodes.ready(node)]
    if not well:
        return _not_ready(land.labelled)
    detail = f"nodes with the labels of profile {land.facts.profile} report no {resource}: {_named(well)}"
    return diagnosis(_C.NO_SUCH_NODE, detail, "plugin", node=reading.name(well[0]))


def _labels(land: Landscape) -> Diagnosis | None:
    if land.both:
        return None
    found = [nodes.missing(land.pod, node) for node in land.offering]
    # The right GPU on the wrong kind of node is nearer than another GPU: what a node must not have, it has besides what
    # the pod is for; and what most nodes lack says least about that.
    without = Counter(requirement for missing in found for requirement in missing)
    lacks = min(
        found,
        key=lambda missing: (
            len(missing),
            sum(not nodes.forbids(entry) for entry in missing),
            sum(without[entry] for entry in missing),
            missing,
        ),
    )
    detail = (
        f"no node has what profile {land.facts.profile} asks for: {'; '.join(lacks)}; "
        f"nodes with {land.facts.resource or 'room'}: {_described(land, lacks)}"
    )
    avoided = all(entry.startswith(f"{HOSTNAME} NotIn ") for entry in lacks)
    variant = "excluded" if avoided else ""
    return diagnosis(_C.TAINT_OR_SELECTOR_MISMATCH, detail, variant, **reading.names_of(land.pod))


def _described(land: Landscape, lacks: list[str]) -> str:
    key = lacks[0].split("=", 1)[0].split(" ", 1)[0]
    values = sorted({reading.text(node, "metadata", "labels", key) or "none" for node in land.offering})
    return f"{len(land.offering)} with {key} {', '.join(values[:SHOWN])}"


def _taints(land: Landscape) -> Diagnosis | None:
    if land.fitting:
        return None
    both = land.both
    node = min(both, key=lambda entry: (len(_own_taints(land.pod, entry)), reading.name(entry)))
    taints = _own_taints(land.pod, node)
    detail = f"{len(both)} nodes fit and carry taints that the pod does not tolerate: {', '.join(taints)} on "
    return diagnosis(_C.TAINT_OR_SELECTOR_MISMATCH, f"{detail}{_named(both)}", "taint", taint=taints[0])


def _states(land: Landscape) -> Diagnosis | None:
    """Return what is the matter where no node that fits is well: leaving ones by intent, the others by accident."""
    if land.well:
        return None
    sick = [node for node in land.fitting if not nodes.ready(node)]
    taints = {reading.name(node): nodes.untolerated(land.pod, node) for node in land.fitting}
    coming = [node for node in land.fitting if any(nodes.is_among(t, nodes.COMING) for t in taints[reading.name(node)])]
    leaving = [
        node for node in land.fitting if any(nodes.is_among(t, nodes.LEAVING) for t in taints[reading.name(node)])
    ]
    if coming:
        return diagnosis(_C.NODE_PROVISIONING, f"node {_named(coming)} is being set up")
    if leaving:
        why = sorted({nodes.key_of(t) for node in leaving for t in taints[reading.name(node)]})
        detail = f"{len(leaving)} of {len(land.fitting)} nodes that fit are cordoned or leaving ({', '.join(why)}): "
        return diagnosis(_C.NODE_CORDONED, f"{detail}{_named(leaving)}", node=reading.name(leaving[0]))
    return _not_ready(sick or land.fitting)


def _not_ready(sick: list[Any]) -> Diagnosis:
    node = sick[0]
    detail = f"no node that fits is ready: {_named(sick)}; {reading.name(node)}: {nodes.trouble(node)}"
    return diagnosis(_C.NODE_NOT_READY, detail, node=reading.name(node))


def _named(found: list[Any]) -> str:
    shown = [reading.name(node) for node in found[:SHOWN]]
    return ", ".join(shown) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def by_reasons(facts: WaitingFacts, pod: Any, message: str) -> Diagnosis | None:
    """Return what the scheduler's reasons alone tell; the later filters are the nearer to success."""
    reasons = messages.scheduler(message)
    short = sorted(
        {reason.why.removeprefix(messages.INSUFFICIENT) for reason in reasons if reason.says(messages.INSUFFICIENT)}
    )
    if facts.resource and facts.resource in short:
        return diagnosis(_C.INSUFFICIENT_GPU, message)
    if short or _say(reasons, messages.TOO_MANY_PODS):
        return diagnosis(_C.INSUFFICIENT_CPU_OR_MEMORY, message, short=", ".join(short) or "pods")
    if _say(reasons, *messages.OTHER_PODS):
        return diagnosis(_C.TAINT_OR_SELECTOR_MISMATCH, message, "affinity", **reading.names_of(pod))
    return _by_taints(reasons, message)


def _by_taints(reasons: list[Reason], message: str) -> Diagnosis | None:
    taints = sorted(filter(None, map(messages.taint_in, reasons)))
    own = [taint for taint in taints if not nodes.is_among(taint, nodes.NOT_READY | nodes.LEAVING | nodes.COMING)]
    if any(nodes.is_among(taint, nodes.NOT_READY) for taint in taints):
        return diagnosis(_C.NODE_NOT_READY, message)
    if _say(reasons, messages.UNSCHEDULABLE):
        return diagnosis(_C.NODE_CORDONED, message)
    if _say(reasons, *messages.TAINT):
        return diagnosis(_C.TAINT_OR_SELECTOR_MISMATCH, message, "taint", taint=own[0] if own else "<taint>")
    return diagnosis(_C.TAINT_OR_SELECTOR_MISMATCH, message) if _say(reasons, *messages.SELECTOR) else None


def _say(reasons: list[Reason], *words: str) -> bool:
    return any(reason.says(*words) for reason in reasons)
