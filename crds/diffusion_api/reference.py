"""The reference documents and the commented example, rendered from the models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from diffusion_api import names, outcomes, schema, waiting, waiting_table
from diffusion_api.job import JobSpec
from diffusion_api.meta import ApiModel
from diffusion_api.status import JobStatus
from diffusion_api.supported import LIMITS, SCHEMES
from diffusion_api.training import DEFAULTS
from diffusion_api.training_profile import ProfileSpec

_EXAMPLES: dict[str, object] = {
    "method": "LoRA",
    "model.source": "s3://models/sd-v1-5/",
    "dataset.source": "s3://team-a/cats/",
    "output.destination": "s3://team-a/models/cats/",
    "output.formats": ["Diffusers", "Kohya"],
    "resources.profile": "a100-80gb",
    "validation.prompts": [{"prompt": "a cat wearing a top hat in a spaceship", "negativePrompt": "blurry"}],
    "credentials.secretRef": {"name": "team-a-s3"},
}
"""Values of the commented example where there is no default or the default says too little."""


def example() -> str:
    """Return a DiffusionTrainingJob with every field, its description and its default."""
    lines = [
        "# Every field of a DiffusionTrainingJob. What is commented out has no default; what is not shows the default,",
        "# or an example where the field is required. Start from examples/minimal.yaml, not from here.",
        f"apiVersion: {names.API_VERSION}",
        f"kind: {names.JOB_KIND}",
        "metadata:",
        "  name: reference",
        "spec:",
        *_fields(schema.structural(JobSpec), path="", indent=2, live=True),
    ]
    return "\n".join(lines) + "\n"


def _fields(node: dict[str, Any], *, path: str, indent: int, live: bool) -> Iterator[str]:
    for name, field in node["properties"].items():
        here = f"{path}.{name}".lstrip(".")
        pad = " " * indent
        for line in field.get("description", "").splitlines():
            yield f"{pad}# {line}"
        if "properties" in field and here not in _EXAMPLES:
            shown = live and not field.get("nullable")
            yield f"{pad}{'' if shown else '# '}{name}:"
            yield from _fields(field, path=here, indent=indent + 2, live=shown)
            continue
        value = _EXAMPLES.get(here, field.get("default"))
        if value is None or not live:
            yield f"{pad}# {name}: {_placeholder(field)}"
        else:
            yield f"{pad}{name}: {_inline(value)}"


def _placeholder(field: dict[str, Any]) -> str:
    if "default" in field:
        return _inline(field["default"])
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    return f"<{field.get('type', 'value')}>"


def _inline(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def api() -> str:
    """Return the reference of both kinds."""
    return "\n".join(
        [
            "# API reference",
            "",
            f"`apiVersion: {names.API_VERSION}`. Every field is also in `kubectl explain {names.JOB_SHORT}.spec`.",
            "",
            "## DiffusionTrainingJob: spec",
            "",
            *_table(JobSpec),
            "",
            "### Defaults that depend on the method",
            "",
            "From published recipes and controlled runs: the READMEs of diffusers' scripts, of kohya-ss/sd-scripts",
            "and EveryDream2trainer, and spacepxl's measurements (the rate grows with the root of the batch size).",
            "",
            "| method | maxSteps | batchSize | learningRate |",
            "|---|---|---|---|",
            *(f"| {m} | {d.max_steps} | {d.batch_size} | {d.learning_rate:g} |" for m, d in DEFAULTS.items()),
            "",
            "### Not supported yet",
            "",
            "The API is complete in shape; values outside of this table are refused with `Validated=False`.",
            "",
            "| field | honoured so far |",
            "|---|---|",
            *(f"| `{limit.path}` | {_allowed(limit.allowed)} |" for limit in LIMITS),
            f"| locations | {', '.join(f'`{scheme}://`' for scheme in SCHEMES)} |",
            "",
            "## DiffusionTrainingJob: status",
            "",
            *_table(JobStatus, defaults=False),
            "",
            "## TrainingProfile: spec",
            "",
            *_table(ProfileSpec),
            "",
        ]
    )


def _allowed(values: tuple[object, ...]) -> str:
    return ", ".join("left out" if value in (None, []) else f"`{_inline(value)}`" for value in values)


def _table(model: type[ApiModel], *, defaults: bool = True) -> list[str]:
    rows = _rows(schema.structural(model, defaults=defaults), "")
    return ["| field | type | default | description |", "|---|---|---|---|", *rows]


def _rows(node: dict[str, Any], path: str) -> Iterator[str]:
    for name, field in node["properties"].items():
        here = f"{path}.{name}".lstrip(".")
        default = field.get("default")
        shown = "" if default in (None, {}) else f"`{_inline(default)}`"
        required = " **required**" if name in node.get("required", []) else ""
        text = " ".join(field.get("description", "").split()).replace("|", "\\|")
        yield f"| `{here}`{required} | {_type(field)} | {shown} | {text} |"
        inner = field.get("items", field)
        if "properties" in inner:
            yield from _rows(inner, f"{here}[]" if "items" in field else here)


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    if field.get("x-kubernetes-int-or-string"):
        return "integer or `Auto`"
    bounds = [
        f"{sign}{'' if field.get(exclusive) else '='} {field[bound]:g}"
        for bound, exclusive, sign in (("minimum", "exclusiveMinimum", ">"), ("maximum", "exclusiveMaximum", "<"))
        if bound in field
    ]
    return " ".join([field.get("type", "any"), *bounds])


def causes() -> str:
    """Return the reference of causes, actions and exit codes."""
    rows = (
        f"| `{o.cause}` | {'' if o.exit_code is None else o.exit_code} | {o.explanation} | {o.action} | {o.remedy} |"
        for o in outcomes.OUTCOMES
    )
    actions = (f"| `{action}` | {_ACTIONS[action]} |" for action in outcomes.Action)
    return "\n".join(
        [
            "# Causes and actions",
            "",
            "Why an attempt ended (`status.attempts[].cause`), and what the operator does about it. The exit code is",
            "the trainer's; where it is missing, pod and node conditions are the evidence.",
            "",
            "| cause | exit code | meaning | action | what you can do |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "| action | meaning |",
            "|---|---|",
            *actions,
            "",
        ]
    )


_ACTIONS = {
    outcomes.Action.SUCCEED: "the job is complete",
    outcomes.Action.RESUME: "a new attempt at once; nothing is counted as failure",
    outcomes.Action.BACK_OFF: f"a new attempt after a backoff, at most {outcomes.INFRASTRUCTURE_BUDGET} running",
    outcomes.Action.RETRY: "a new attempt after a backoff, counted towards `runPolicy.backoffLimit`",
    outcomes.Action.RETUNE: "a new attempt at once with half the micro-batch and the same batch",
    outcomes.Action.FAIL: "the job fails: trying again cannot help",
    outcomes.Action.IGNORE: "a newer attempt is in charge",
}


def why_it_waits() -> str:
    """Return the reference of what `status.pending` can say."""
    rows = (
        f"| {rank} | `{wait.cause}`{f' ({wait.variant})' if wait.variant else ''} | {wait.explanation} | "
        f"{wait.hint.replace('{', '<').replace('}', '>')} |"
        for rank, cause in enumerate(waiting.WaitingCause, start=1)
        for wait in waiting_table.WAITS
        if wait.cause == cause
    )
    return "\n".join(
        [
            "# Why a job waits",
            "",
            "`status.pending` says in `cause` why the pods of a job do not run, in `detail` what was seen, and in",
            "`hint` what can be done. It is judged in this order, and the first answer counts:",
            "",
            *_JUDGEMENT,
            "",
            "Of several pods the one speaks whose cause has the lowest number below: what nobody can wait out comes",
            "before what passes by itself. What is not recognised is `Unknown`, with the words of whoever said it.",
            "",
            "| | cause | meaning | what you can do |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


_JUDGEMENT = (
    "1. The API server refused to create the pod: its sentence.",
    "2. A pod with a node: its container's waiting reason (image, configuration); its node, if it is not ready; mounts",
    "   that failed since the last stage passed; the sandbox; a pull in progress; else it starts.",
    "3. A pod without a node:",
    "   1. scheduling gates: Kueue's through the Workload, others by name;",
    "   2. a nominated node: pods of lower priority are being stopped;",
    "   3. PersistentVolumeClaims that the scheduler names;",
    "   4. an autoscaler's promise, shortage or failure, if it is its newest word and recent;",
    "   5. the nodes: one with the resource and the labels, without untolerated taints, ready, large enough, with free",
    "      GPUs on one node, with free CPU, memory, disk and room for a pod; the first that no node passes. A full",
    "      node group counts where a node of the profile exists, because the autoscaler names every full group;",
    "   6. where a node seems to have room or nodes are not known: the scheduler's own sentence.",
    "",
    "Events count when they are about this very pod (by uid) and not older than 15 minutes (35 for promises).",
)
