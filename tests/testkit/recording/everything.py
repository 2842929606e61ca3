"""All situations, and how one of them is recorded."""

from __future__ import annotations

from pathlib import Path

from testkit.kube import Kube
from testkit.recording import crowds, misfits, nodes_unwell, pods_unwell, queues, refusals, writing
from testkit.recording.situation import Situation
from testkit.recording.stage import Stage

GROUPS = (
    crowds.SITUATIONS,
    misfits.SITUATIONS,
    nodes_unwell.SITUATIONS,
    pods_unwell.SITUATIONS,
    refusals.SITUATIONS,
    queues.SITUATIONS,
)
EVERY: dict[str, Situation] = {name: found for group in GROUPS for name, found in group.items()}


def record(kube: Kube, situation: Situation, *, folder: Path = writing.CORPUS) -> Path:
    """Make one situation, write it down, and clear it away; return its file."""
    stage = Stage(kube, name=situation.name)
    try:
        situation.make(stage)
        return writing.write(situation, stage, folder=folder)
    finally:
        stage.clear()


def needs_queues(situation: Situation) -> bool:
    """Return whether it takes Kueue."""
    return situation.name in queues.SITUATIONS
