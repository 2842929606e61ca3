"""Write every file that is derived from the contract; `--check` only compares.

python -m diffusion_api.generate [--check] [--root DIR]
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from diffusion_api import memory_reference, reference, schema

MARK = "Generated from crds/diffusion_api by `make generate`. Edit that instead."
CHART_CRDS = Path("charts/diffusion-operator/templates/crds")


def files(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield (path below root, content) of every generated file."""
    for crd in (schema.job_crd(), schema.profile_crd()):
        name = f"{crd['spec']['names']['plural']}.yaml"
        yield Path("crds") / name, f"# {MARK}\n{_yaml(crd)}"
        if (root / CHART_CRDS.parent).is_dir():
            yield CHART_CRDS / name, _chart_copy(crd)
    yield Path("docs/reference/api.md"), f"<!-- {MARK} -->\n{reference.api()}"
    yield Path("docs/reference/causes.md"), f"<!-- {MARK} -->\n{reference.causes()}"
    yield Path("docs/reference/waiting.md"), f"<!-- {MARK} -->\n{reference.why_it_waits()}"
    yield Path("docs/reference/memory.md"), f"<!-- {MARK} -->\n{memory_reference.memory()}"
    yield Path("examples/reference.yaml"), f"# {MARK}\n{reference.example()}"


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)


def _chart_copy(crd: dict[str, Any]) -> str:
    """Return the CRD as a template that helm installs, upgrades and, so that no job is lost, never deletes."""
    kept = crd | {"metadata": crd["metadata"] | {"annotations": {"helm.sh/resource-policy": "keep"}}}
    # Text of ours that contains helm's delimiters would be evaluated by helm.
    body = _yaml(kept).replace("{{", "{{ `{{` }}")
    return f"{{{{- if .Values.crds.enabled }}}}\n# {MARK}\n{body}{{{{- end }}}}\n"


def main(arguments: list[str] | None = None) -> int:
    """Write or compare; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m diffusion_api.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail and print the difference if stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="root of the clone")
    options = parser.parse_args(arguments)
    stale = False
    for path, content in files(options.root):
        target = options.root / path
        before = target.read_text() if target.exists() else ""
        if before == content:
            continue
        if options.check:
            stale = True
            lines = difflib.unified_diff(before.splitlines(), content.splitlines(), str(path), "generated", lineterm="")
            sys.stdout.write("\n".join(lines) + "\n")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content)
    if stale:
        sys.stdout.write("generated files are stale: run `make generate`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
