"""Nodes that fit and are full: of GPUs, of whole nodes, or of everything else."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting import occupancy, reading
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts, diagnosis
from diffusion_operator.policies.waiting.occupancy import Amounts, Room

HOLDERS = 4
"""So many holders of GPUs are named."""

_C = WaitingCause


def why_crowded(facts: WaitingFacts, pod: Any, well: list[Any]) -> Diagnosis | None:
    """Return what there is too little of on these nodes; None where there is room, or it is not known."""
    wanted = occupancy.requested(pod)
    bound = [entry for entry in facts.pods if reading.text(entry, "spec", "nodeName")]
    rooms = occupancy.rooms(well, [*(facts.others or ()), *bound])
    found = _too_small(facts, wanted, rooms)
    if found is not None or facts.others is None:
        return found
    resource = facts.resource
    if resource is None:
        return _everything_else(wanted, rooms)
    with_gpus = [room for room in rooms if room.free.get(resource, Decimal(0)) >= wanted.get(resource, Decimal(0))]
    if with_gpus:
        return _everything_else(wanted, with_gpus)
    return _gpus(facts, wanted[resource], rooms)


def _too_small(facts: WaitingFacts, wanted: Amounts, rooms: list[Room]) -> Diagnosis | None:
    """Return what no node could ever give."""
    if not rooms or any(not room.too_small(wanted) for room in rooms):
        return None
    resource = facts.resource
    if resource is not None and all(resource in room.too_small(wanted) for room in rooms):
        most = max(room.total.get(resource, Decimal(0)) for room in rooms)
        detail = f"one pod asks for {wanted[resource]} {resource}; nodes of profile {facts.profile} have {most} at most"
        return diagnosis(_C.NO_SUCH_NODE, detail, "size", most=str(most))
    best = min(rooms, key=lambda room: (len(room.too_small(wanted)), room.node))
    short = best.too_small(wanted)
    detail = f"too small even when empty: {_numbers(best.node, wanted, best.total, short)}"
    return diagnosis(_C.NO_SUCH_NODE, detail, "cpu", short=", ".join(short))


def _everything_else(wanted: Amounts, rooms: list[Room]) -> Diagnosis | None:
    if any(not room.lacking(wanted) for room in rooms):
        return None
    best = min(rooms, key=lambda room: (len(room.too_small(wanted)), len(room.lacking(wanted)), room.node))
    short = best.lacking(wanted)
    detail = _numbers(best.node, wanted, best.free, short)
    found = {"short": ", ".join(short), "node": best.node}
    return diagnosis(_C.INSUFFICIENT_CPU_OR_MEMORY, detail, **found)


def _numbers(node: str, wanted: Amounts, there: Amounts, short: list[str]) -> str:
    """Return `node x has 3 cpu and the pod asks for 4`, for each of these resources."""
    pairs = [
        f"{reading.shown(there.get(key, Decimal(0)), key)} of {reading.shown(wanted[key], key)} {key}" for key in short
    ]
    return f"node {node} has {', '.join(pairs)} that the pod asks for"


def _gpus(facts: WaitingFacts, wanted: Decimal, rooms: list[Room]) -> Diagnosis:
    resource = str(facts.resource)
    free = {room.node: max(room.free.get(resource, Decimal(0)), Decimal(0)) for room in rooms}
    spare = sum(free.values(), Decimal(0))
    if spare >= wanted:
        most = max(free.values())
        spread = ", ".join(f"{node} {amount}" for node, amount in sorted(free.items()) if amount > 0)
        detail = f"{spare} {resource} are free, {most} at most on one node, and one pod asks for {wanted}: {spread}"
        return diagnosis(_C.FRAGMENTED, detail, most=str(most))
    total = sum((room.total.get(resource, Decimal(0)) for room in rooms), Decimal(0))
    held = occupancy.holders([*(facts.others or ()), *facts.pods], free, resource)
    shown = ", ".join(f"{who} {amount}" for who, amount in list(held.items())[:HOLDERS])
    more = f" and {len(held) - HOLDERS} more" if len(held) > HOLDERS else ""
    detail = f"{spare} of {total} {resource} on {len(rooms)} nodes are free, and one pod asks for {wanted}"
    by = f"; held by {shown}{more}" if shown else ""
    return diagnosis(_C.INSUFFICIENT_GPU, f"{detail}{by}{_next_end(facts, held)}")


def _next_end(facts: WaitingFacts, held: dict[str, Decimal]) -> str:
    ends = [(end, who) for who, end in facts.job_ends.items() if who in held and isinstance(end, datetime)]
    if not ends:
        return ""
    end, who = min(ends)
    return f"; the first to end is {who}, at {end:%Y-%m-%d %H:%M} UTC by its own estimate"
