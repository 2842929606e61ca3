"""Where a pod may run: selectors, affinity and tolerations from the profile, the capacity and the user's overrides."""

from __future__ import annotations

from diffusion_api.job import JobSpec
from diffusion_api.resources import NodeCapacity, Toleration
from diffusion_api.training_profile import NodeRequirement, ProfileSpec
from diffusion_operator.state import Object

UNREACHABLE_SECONDS = 30
"""Kubernetes' own default is 300: five minutes in which a dead node keeps the job from going on."""
HOSTNAME = "kubernetes.io/hostname"
_NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def node_selector(spec: JobSpec, profile: ProfileSpec, *, capacity: NodeCapacity) -> dict[str, str]:
    """Return the labels that nodes must have; the profile's cannot be overridden."""
    spot = profile.spot.node_selector if profile.spot and capacity == "Spot" else {}
    return spec.pod_overrides.node_selector | spot


def affinity(profile: ProfileSpec, *, capacity: NodeCapacity, avoided: tuple[str, ...] = ()) -> Object:
    """Return the node affinity; empty without any.

    All requirements of the profile, none of the avoided nodes and, on demand, no spot node.
    """
    wanted = [_expression(requirement) for requirement in profile.node_affinity]
    if avoided:
        wanted.append({"key": HOSTNAME, "operator": "NotIn", "values": list(avoided)})
    spot = profile.spot.node_selector if profile.spot and capacity == "OnDemand" else {}
    # A spot node has all of the labels. Terms are alternatives: a node that lacks any one of them will do.
    terms = [[*wanted, {"key": key, "operator": "NotIn", "values": [value]}] for key, value in spot.items()]
    terms = terms or ([wanted] if wanted else [])
    if not terms:
        return {}
    required = {"nodeSelectorTerms": [{"matchExpressions": term} for term in terms]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}


def tolerations(spec: JobSpec, profile: ProfileSpec, *, capacity: NodeCapacity) -> list[Object]:
    """Return all tolerations: the profile's, spot's unless on demand, the user's, and short ones for dead nodes."""
    spot = profile.spot.tolerations if profile.spot and capacity == "Spot" else ()
    given: list[Toleration] = [*profile.tolerations, *spot, *spec.pod_overrides.tolerations]
    dead = [
        Toleration(key=key, operator="Exists", effect="NoExecute", toleration_seconds=UNREACHABLE_SECONDS)
        for key in _NODE_TAINTS
    ]
    found: list[Object] = []
    for toleration in [*given, *dead]:
        entry = toleration.to_json_object()
        if entry not in found:
            found.append(entry)
    return found


def _expression(requirement: NodeRequirement) -> Object:
    entry: Object = {"key": requirement.key, "operator": requirement.operator}
    return entry | ({"values": list(requirement.values)} if requirement.values else {})
