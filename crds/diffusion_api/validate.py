"""Everything that can be known to be wrong with a job from the job alone, as sentences for its author.

The API server refuses most of it already (schema and CEL). What passes there, because another version of the CRD is
installed or because no code honours it yet, is found here: by the operator (condition `Validated=False`), and by tools
without a cluster.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from diffusion_api.job import JobSpec
from diffusion_api.names import MAX_JOB_NAME
from diffusion_api.supported import unsupported

MAX_SHOWN = 80


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    path: str
    """Field, as a user writes it: `spec.training.maxSteps`."""
    value: object
    """What stands there; None where it is missing."""
    remedy: str
    """What is wrong with it and what to write instead."""

    def __str__(self) -> str:
        """Return the sentence: field, value and remedy."""
        shown = "" if self.value is None else f": {_short(self.value)}"
        return f"{self.path}{shown}: {self.remedy}"


class InvalidJobError(ValueError):
    """A job that cannot be run, with every reason."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = problems


def parse(job: dict[str, Any], *, local: bool = False) -> JobSpec:
    """Return the job's spec.

    Raises:
        InvalidJobError: with all problems at once, not only the first.
    """
    problems = list(_metadata_problems(job))
    try:
        spec = JobSpec.model_validate(job.get("spec") or {})
    except ValidationError as error:
        raise InvalidJobError(problems + _merged(map(_problem, error.errors(include_url=False)))) from error
    for path, value, remedy in unsupported(spec, local=local):
        problems.append(Problem(f"spec.{path}", value, f"not supported yet: {remedy}"))
    problems += _sharing_problems(job, spec)
    if problems:
        raise InvalidJobError(problems)
    return spec


def _sharing_problems(job: dict[str, Any], spec: JobSpec) -> Iterator[Problem]:
    """Yield what several processes cannot share, and what several pods cannot be called."""
    processes = spec.resources.nodes * spec.resources.gpus_per_node
    if spec.batch_size % processes:
        remedy = f"use a multiple of {processes}, so that all GPUs (resources.nodes x gpusPerNode) get equal shares"
        yield Problem("spec.training.batchSize", spec.batch_size, remedy)
    name = job.get("metadata", {}).get("name", "")
    if spec.resources.nodes > 1 and not name[:1].isalpha():
        remedy = "begin with a letter: pods on several nodes find each other by a Service of that name"
        yield Problem("metadata.name", name, remedy)


def _metadata_problems(job: dict[str, Any]) -> Iterator[Problem]:
    name = job.get("metadata", {}).get("name", "")
    if len(name) > MAX_JOB_NAME:
        yield Problem("metadata.name", name, f"use at most {MAX_JOB_NAME} characters: pods are called after the job")
    if "." in name:
        yield Problem("metadata.name", name, "use no dots: pods are called after the job, and a dot ends a host name")


def _merged(problems: Iterable[Problem]) -> list[Problem]:
    """Join what is said of one field: each member of a union complains for itself."""
    merged: dict[str, Problem] = {}
    for problem in problems:
        first = merged.get(problem.path)
        remedy = f"{first.remedy} or {problem.remedy.removeprefix('input should be ')}" if first else problem.remedy
        merged[problem.path] = Problem(problem.path, problem.value, remedy)
    return list(merged.values())


def _problem(item: Any) -> Problem:
    # pydantic puts the names of a union's members into the path: `microBatchSize.constrained-int`.
    path = ".".join(["spec", *(str(part) for part in item["loc"] if not re.search(r"[-\[]|^int$", str(part)))])
    if item["type"] == "missing":
        return Problem(path, None, "is required")
    if item["type"] == "extra_forbidden":
        return Problem(path, item["input"], f"unknown field{_did_you_mean(item['loc'])}")
    if item["type"] == "value_error":
        return Problem(path, None, str(item["ctx"]["error"]))
    return Problem(path, item["input"], item["msg"][:1].lower() + item["msg"][1:])


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    """Return `, did you mean ...` for a misspelt key of a known section."""
    model: Any = JobSpec
    for part in location[:-1]:
        field = next((f for f in model.model_fields.values() if part == f.alias), None) if _is_model(model) else None
        model = field.annotation if field else None
        if not _is_model(model):
            model = next((a for a in getattr(model, "__args__", ()) if _is_model(a)), None)
    if not _is_model(model):
        return ""
    known = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
    return f", did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _is_model(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _short(value: object) -> str:
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + "..."
