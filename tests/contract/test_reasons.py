"""Every reason that the operator's source gives to a condition stands in docs/reference/operator.md, and no other."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_api import status

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "operator.md").read_text()
POLICIES = sorted((ROOT / "operator" / "diffusion_operator" / "policies").glob("*.py"))
WRITERS = {"_say", "set_condition", "refused"}
NO_REASON = {*status.CONDITIONS, "True", "False", "Unknown"}
ALSO = {"Complete", "Failed", "Suspended", "Admitted", "BackoffLimitExceeded"}
"""Reasons that are called like a condition, or come by a verdict; that each is used is seen by reading."""
REASON = re.compile(r"[A-Z][A-Za-z]+")


def literals(node: ast.AST, module: object) -> Iterator[str]:
    """Yield the words that look like reasons in an expression: literals, and constants of the module."""
    for part in ast.walk(node):
        value = getattr(module, part.id, None) if isinstance(part, ast.Name) and part.id.isupper() else None
        value = part.value if isinstance(part, ast.Constant) else value
        if isinstance(value, str) and REASON.fullmatch(value) and value not in NO_REASON:
            yield value


def places(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the expressions of a node that become a reason: arguments of writers, tables by condition, yields."""
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in WRITERS:
            yield from [*node.args, *(word.value for word in node.keywords)]
        case ast.Dict(keys=[ast.Constant(value=first), *_]) if first in status.CONDITIONS:
            yield from node.values
        case ast.Yield(value=ast.Tuple(elts=[first, _, _])):
            yield first
        case ast.Return(value=ast.Tuple(elts=[first, _])):  # a stage and its message
            yield first
        case ast.Assign():
            yield from assigned(node)


def assigned(node: ast.Assign) -> Iterator[ast.AST]:
    """Yield what is assigned to `reason`, alone or among others."""
    match node:
        case ast.Assign(targets=[ast.Name(id="reason")]):
            yield node.value
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            for name, value in zip(names, values, strict=True):
                if isinstance(name, ast.Name) and name.id == "reason":
                    yield value


def given(tree: ast.AST, module: object) -> set[str]:
    """Return all reasons in a module's source."""
    found = (place for node in ast.walk(tree) for place in places(node))
    return {reason for place in found for reason in literals(place, module)}


def of_choices(path: Path) -> bool:
    """Return whether a module's `reason` is one of a choice, which status.placement and not a condition holds."""
    return path.stem == "choices"


def documented() -> set[str]:
    section = PAGE.split("\n## Reasons of conditions\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([A-Za-z]+)` \| ([A-Za-z, ]+) \|", section, flags=re.MULTILINE)
    assert {word.strip() for _, where in rows for word in where.split(",")} <= set(status.CONDITIONS)
    return {reason for reason, _ in rows}


def test_reasons_of_conditions() -> None:
    found: set[str] = set()
    for path in POLICIES:
        if not of_choices(path):
            module = importlib.import_module(f"diffusion_operator.policies.{path.stem}")
            found |= given(ast.parse(path.read_text()), module)
    assert found - documented() == set(), "given and not documented"
    assert documented() - found == ALSO, "documented and not given"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('_say(case, status, "PodsReady", "False", "Brandnew", "words")', "Brandnew"),
        ('set_condition(status, "Complete", "True", reason="Brandnew" if x else "Running")', "Brandnew"),
        ('for kind, reason in {"Suspended": "Brandnew"}.items(): pass', "Brandnew"),
        ('value, reason, said = "Unknown", "Brandnew", "words"', "Brandnew"),
        ('def f():\n    yield "Brandnew", "what", "hint"', "Brandnew"),
    ],
)
def test_a_new_reason_would_be_noticed(source: str, reason: str) -> None:
    """Negative control."""
    assert reason in given(ast.parse(source), None)
