"""python -m diffusion_operator: run the operator with the service account of its pod, or the current kubeconfig."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from typing import Any, cast

import kopf

from diffusion_api import names
from diffusion_operator import handlers
from diffusion_operator.errors import SettingsError
from diffusion_operator.settings import PREFIX, Settings

WRONG_USAGE = 64


def main(arguments: list[str] | None = None) -> int:
    """Run until a signal; return the exit code."""
    elsewhere = {"failpoint", "kubeconfig"}
    fields = (field.name.upper() for field in dataclasses.fields(Settings) if field.name not in elsewhere)
    variables = (f"  {PREFIX}{name}" for name in fields)
    argparse.ArgumentParser(
        prog="python -m diffusion_operator",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="\n".join(["environment:", *variables, "What each means: docs/reference/operator.md"]),
    ).parse_args(arguments)
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return WRONG_USAGE
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    registry = kopf.get_default_registry()
    assert handlers  # noqa: S101 - imported for what it registers
    try:
        kopf.run(
            registry=registry,
            standalone=True,
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
            # Never used without peering; left out, kopf asks for its user's name, and in a pod the user has none.
            identity=cast("Any", names.MANAGED_BY),
        )
    except Exception as error:
        # How kopf wraps what `handlers.start` raised is its own affair; only the reason is for people.
        if not isinstance(error.__cause__, kopf.PermanentError):
            raise
        sys.stderr.write(f"{error.__cause__}\n")
        return WRONG_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
