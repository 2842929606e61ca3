"""Every recorded situation is diagnosed; accuracy and confusions are printed (`pytest -s`)."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_api.waiting import WaitingCause
from diffusion_api.waiting_table import WAITS
from diffusion_operator.policies.waiting.facts import MAX_TEXT
from testkit.labelled import diagnose, wrong

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(CORPUS.glob("*.yaml"))
SETS = ("development", "blind", "recorded")
LEAST_SITUATIONS = 75
LEAST_RECORDED = 100
LEAST_ACCURACY = 0.95
"""Of each set."""
CAUSES_WITHOUT_SITUATION = {WaitingCause.POD_NAME_TAKEN, WaitingCause.SERVICE_NAME_TAKEN}
"""Diagnosed where the pod is created (`apply`), not from facts."""
VERBS = "add|ask|build|check|correct|create|delete|look at|lower|name|raise|set|stop|use|wait"
FIELD_OR_COMMAND = re.compile(
    r"kubectl [a-z]+|spec\.[a-z][A-Za-z]+|the profile's [a-z][A-Za-z]+|label kueue\.x-k8s\.io/|ask who runs the \w+ "
)


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def text_of(path: Path) -> str:
    return json.dumps(yaml.load(path.read_text(), Loader=LOADER))


def load(path: Path) -> dict[str, Any]:
    """Return the situation, a fresh copy each time."""
    found: dict[str, Any] = json.loads(text_of(path))
    return found


def test_accuracy() -> None:
    """95 % right causes in each set; the list of confusions is the report."""
    right, lines = dict.fromkeys(SETS, 0), []
    total = dict.fromkeys(right, 0)
    for path in FILES:
        case = load(path)
        found = diagnose(case)
        total[case["set"]] += 1
        right[case["set"]] += found.cause == case["expect"]["cause"]
        differs = wrong(case, found)
        if differs:
            lines.append(f"{path.name}: {'; '.join(differs)}\n    detail: {found.detail}\n    hint: {found.hint}")
    for name, count in right.items():
        print(f"{name}: {count} of {total[name]} causes right")
    print("\n".join(lines) or "no confusions")
    assert len(FILES) >= LEAST_SITUATIONS
    assert total["recorded"] >= LEAST_RECORDED
    assert all(right[name] >= LEAST_ACCURACY * total[name] for name in SETS), "\n".join(lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_situation(path: Path) -> None:
    """Cause, detail and hint are as labelled; the texts are bounded; the order of facts does not matter."""
    case = load(path)
    found = diagnose(case)
    assert not wrong(case, found), f"{found}"
    assert len(found.detail) <= MAX_TEXT
    assert len(found.hint) <= MAX_TEXT
    shuffler = random.Random(7)
    for key in ("pods", "events", "nodes", "others"):
        if key in case["facts"]:
            shuffler.shuffle(case["facts"][key])
    assert diagnose(case) == found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hint_names_something_to_do(path: Path) -> None:
    """An imperative, and a field of the job or profile, a command, or whom to ask; nothing unfilled."""
    hint = diagnose(load(path)).hint
    assert re.match(rf"({VERBS})\b", hint), hint
    assert FIELD_OR_COMMAND.search(hint), hint
    assert not re.search(r"<(?!taint>)\w+>", hint), hint


def test_every_cause_is_in_the_corpus() -> None:
    assert {load(path)["expect"]["cause"] for path in FILES} == set(WaitingCause) - CAUSES_WITHOUT_SITUATION


def test_every_cause_has_a_row() -> None:
    assert {wait.cause for wait in WAITS if not wait.variant} == set(WaitingCause)


def test_a_wrong_label_is_noticed() -> None:
    """Negative control: the comparison is not satisfied by anything."""
    case = load(CORPUS / "gpu-all-busy-gfd.yaml")
    case["expect"] = {"cause": "Fragmented", "detail": ["no such words"], "hint": ["neither these"]}
    assert len(wrong(case, diagnose(case))) == 3
