"""Some situations of the corpus are made anew, each kind on the real control plane, and diagnosed as labelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from testkit.kube import Kube
from testkit.labelled import diagnose, wrong
from testkit.recording.everything import EVERY, record
from testkit.recording.plant import plant

pytestmark = [pytest.mark.apiserver, pytest.mark.nightly]

CHOSEN = (
    "gpus-full-gke",
    "fragmented-karpenter",
    "preempting",
    "one-of-two-placed",
    "other-gpu-eks",
    "excluded-by-us",
    "runtime-down",
    "claim-unbound",
    "quota-of-gpus",
    "pod-security-sidecar",
    "webhook-down",
    "resource-without-quota",
    "check-pending",
    "quota-used",
)


@pytest.fixture(scope="module")
def kube() -> Iterator[Kube]:
    with plant(queues=True) as found:
        yield found


@pytest.mark.parametrize("name", CHOSEN)
def test_made_anew_it_is_diagnosed_as_labelled(kube: Kube, name: str, tmp_path: Path) -> None:
    path = record(kube, EVERY[name], folder=tmp_path)
    case = yaml.safe_load(path.read_text())
    found = diagnose(case)
    assert not wrong(case, found), f"{found}"
