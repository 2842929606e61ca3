"""docs/reference says all that the code does, and nothing that it does not."""

import dataclasses
import re
from pathlib import Path

import pytest

from diffusion_api import names, status
from diffusion_api.outcomes import OUTCOMES, SHORT_OF_ROOM, Action
from diffusion_operator.desired.event import REASONS
from diffusion_operator.metrics import LABELS, PER_JOB
from diffusion_operator.metrics import Metrics as OperatorMetrics
from diffusion_operator.node_state import DEPARTURES, GIVEN_UP, UNREACHABLE
from diffusion_operator.policies.resources import TOO_LITTLE_MEMORY
from diffusion_operator.policies.run_policy import EXHAUSTED
from diffusion_operator.settings import PREFIX, Settings
from diffusion_trainer.metrics import Metrics as TrainerMetrics

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "operator.md").read_text()


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(title):
    return set(re.findall(r"^\| `([^`]+)`", section(title), flags=re.MULTILINE))


def exposed(registry):
    return {family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()}


def test_settings():
    fields = {field.name for field in dataclasses.fields(Settings)} - {"failpoint", "kubeconfig"}
    variables = {f"{PREFIX}{name.upper()}" for name in fields} | {"KUBECONFIG"}
    assert first_column("Settings of the operator") == variables


def test_events():
    assert first_column("Events") == set(REASONS)


def test_conditions():
    assert first_column("Conditions") == set(status.CONDITIONS)


def test_reasons_of_failed():
    final = {outcome.cause for outcome in OUTCOMES if outcome.action in {Action.FAIL, Action.RETUNE}}
    reasons = {str(cause) for cause in final | set(SHORT_OF_ROOM)} | {EXHAUSTED, TOO_LITTLE_MEMORY}
    assert first_column("Reasons of Failed") == reasons


def test_metrics():
    operator = OperatorMetrics(version="0", jobs=list, depth=lambda: 0)
    assert first_column("Metrics of the operator") == exposed(operator.registry)
    assert first_column("Metrics of the trainer") == exposed(TrainerMetrics().registry)


def described(registry):
    """Return type and labels of each metric, by its name."""
    found = {}
    for one in set(registry._names_to_collectors.values()):
        if hasattr(one, "_labelnames"):
            found[one._name + ("_total" if one._type == "counter" else "")] = (one._type, ", ".join(one._labelnames))
    return found


@pytest.mark.parametrize("page", ["Metrics of the operator", "Metrics of the trainer"])
def test_types_and_labels_of_metrics(page):
    if page == "Metrics of the trainer":
        wanted = described(TrainerMetrics().registry)
    else:
        wanted = described(OperatorMetrics(version="0", jobs=list, depth=lambda: 0).registry)
        wanted |= {one.name: ("gauge", ", ".join((*LABELS, *one.labels))) for one in PER_JOB}
        wanted["diffusion_operator_jobs"] = ("gauge", "namespace, phase")
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| ([^|]*) \|", section(page), flags=re.MULTILINE)
    assert {name: (kind, labels.strip()) for name, kind, labels in rows} == wanted


def test_what_nodes_say():
    rows = dict(re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \|$", section("What nodes say"), flags=re.MULTILINE))
    lost = {UNREACHABLE: "`NodeLost`"} | dict.fromkeys(GIVEN_UP, "`NodeLost`")
    leaving = {key: "`Preempted` at once" if it.final else "explains an eviction" for key, it in DEPARTURES.items()}
    assert rows == lost | leaving


def test_labels():
    labels = {value for name, value in vars(names).items() if name.startswith("LABEL_")}
    assert first_column("Labels of a job's pods") == labels
