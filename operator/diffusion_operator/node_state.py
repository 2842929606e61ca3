"""What a node says about the fate of the pods on it: that nothing is to be heard of them any more, or that it will go.

Nodes themselves are not kept: of each only this is, and of most it is nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from diffusion_operator import timestamps

UNREACHABLE = "node.kubernetes.io/unreachable"
LOST_AFTER = timedelta(seconds=10)
"""For so long after the control plane gave a node up it may still come back with its pods as if nothing had been."""
GIVEN_UP: Mapping[str, str] = {
    "node.kubernetes.io/out-of-service": "was declared out of service",
    "node.cloudprovider.kubernetes.io/shutdown": "is shut down, as its cloud says",
}
"""Taints by which somebody who knows says that nothing runs on a node any more."""
MAX_GONE = 1000
"""Nodes that are remembered as gone; older ones no pod speaks of any more."""


@dataclass(frozen=True, kw_only=True)
class Departure:
    """What a taint says about a node's near end."""

    meaning: str
    final: bool = True
    """Whether the node goes whatever happens. Where not, pods are evicted when it comes about, and not before."""


DEPARTURES: Mapping[str, Departure] = {
    "aws-node-termination-handler/spot-itn": Departure(meaning="its spot instance is interrupted"),
    "aws-node-termination-handler/asg-lifecycle-termination": Departure(
        meaning="its Auto Scaling group ends the instance"
    ),
    "aws-node-termination-handler/scheduled-maintenance": Departure(meaning="its instance is due for maintenance"),
    "aws-node-termination-handler/rebalance-recommendation": Departure(
        meaning="its spot instance is at risk of an interruption", final=False
    ),
    "cloud.google.com/impending-node-termination": Departure(meaning="its machine is about to be ended"),
    "ToBeDeletedByClusterAutoscaler": Departure(meaning="the cluster autoscaler removes it"),
    # Karpenter starts a replacement first, and takes the taint back where there is none to be had.
    "karpenter.sh/disrupted": Departure(meaning="Karpenter replaces or removes it", final=False),
    "karpenter.sh/disruption": Departure(meaning="Karpenter replaces or removes it", final=False),
}
"""By key of the taint. Sources: the node termination handler's README, GKE's and Karpenter's documentation, the cluster
autoscaler's source."""


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """The news of one node."""

    lost: str = ""
    """Why nothing is to be heard of its pods, as a predicate of the node; empty where it answers."""
    lost_since: datetime | None = None
    """Since when it does not answer; None where it is certain."""
    departures: tuple[Mapping[str, Any], ...] = ()
    """Taints that say that it will go."""

    def is_lost(self, now: datetime) -> bool:
        """Return whether its pods are to be given up. That they may still run is harmless: checkpoints are fenced."""
        return bool(self.lost) and self.seconds_to_lost(now) <= 0

    def seconds_to_lost(self, now: datetime) -> float:
        """Return for how long a node that does not answer is still waited for."""
        if self.lost_since is None:
            return 0.0
        return max(0.0, (self.lost_since + LOST_AFTER - now).total_seconds())

    @property
    def leaving(self) -> str:
        """Why it will go, in words with the taints; empty where nothing says so."""
        return "; ".join(f"{DEPARTURES[taint['key']].meaning} (taint {taint['key']})" for taint in self.departures)


QUIET = NodeState()
"""A node of which there is nothing to say."""


def read(node: Mapping[str, Any]) -> NodeState:
    """Return what a node object says."""
    taints = (node.get("spec") or {}).get("taints") or ()
    departures = tuple(taint for taint in taints if taint["key"] in DEPARTURES)
    for taint in taints:
        if taint["key"] in GIVEN_UP:
            return NodeState(lost=f"{GIVEN_UP[taint['key']]} (taint {taint['key']})", departures=departures)
    # The taint with NoExecute is the control plane's judgement: where half of all nodes are silent it blames itself and
    # sets none.
    silent = next((t for t in taints if (t["key"], t["effect"]) == (UNREACHABLE, "NoExecute")), None)
    ready: Mapping[str, Any] = next(
        (c for c in (node.get("status") or {}).get("conditions") or () if c["type"] == "Ready"), {}
    )
    if silent is None or ready.get("status") == "True":
        return NodeState(departures=departures) if departures else QUIET
    since = silent.get("timeAdded") or ready.get("lastTransitionTime")
    return NodeState(
        lost=f"does not answer (taint {UNREACHABLE}, Ready {ready.get('status', 'Unknown')})",
        lost_since=timestamps.from_text(str(since)) if since else None,
        departures=departures,
    )


class NodeStates:
    """The nodes that there is something to say of, by name. Without the right to watch nodes it stays empty."""

    def __init__(self) -> None:
        self._states: dict[str, NodeState] = {}
        self._gone: OrderedDict[str, NodeState] = OrderedDict()

    def of(self, name: str) -> NodeState:
        """Return the state of a node; that of one that was never heard of is QUIET."""
        return self._states.get(name) or self._gone.get(name) or QUIET

    def put(self, node: Mapping[str, Any]) -> bool:
        """Take in what a node says; return whether it was news."""
        name, state = node["metadata"]["name"], read(node)
        before = self.of(name)
        self._gone.pop(name, None)
        if state == QUIET:
            self._states.pop(name, None)
        else:
            self._states[name] = state
        return state != before

    def remove(self, node: Mapping[str, Any]) -> bool:
        """Take in that a node is gone; return whether it was news."""
        name = node["metadata"]["name"]
        before = self.of(name)
        departures = before.departures or read(node).departures
        self._states.pop(name, None)
        self._gone[name] = NodeState(lost="is gone", departures=departures)
        while len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)
        return self._gone[name] != before
