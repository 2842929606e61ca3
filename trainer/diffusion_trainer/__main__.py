"""`python -m diffusion_trainer`: one attempt of one job, told by a run file and a few environment variables."""

from __future__ import annotations

import argparse
import os
import sys
import threading

from diffusion_api import names
from diffusion_api.outcomes import OUTCOMES
from diffusion_trainer.settings import ENV_LOADER_WORKERS, ENV_METRICS_PORT, read_settings
from diffusion_trainer.supervisor import supervise  # torch is imported by neither, until training begins

EXIT_SECONDS = 30.0
"""After this long, threads or exit hooks of libraries hold the process up no longer."""


def main() -> int:
    """Train one attempt; return the exit code."""
    codes = "\n".join(
        f"  {int(outcome.exit_code):3d} {outcome.explanation}" for outcome in OUTCOMES if outcome.exit_code is not None
    )
    argparse.ArgumentParser(
        prog="python -m diffusion_trainer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train one attempt of a DiffusionTrainingJob.",
        epilog=(
            f"environment:\n"
            f"  {names.ENV_RUN_FILE}         the RunConfig as JSON [{names.RUN_DIR}/{names.RUN_FILE}]\n"
            f"  {names.ENV_CREDENTIALS_DIR}  folder of the storage's Secret [{names.CREDENTIALS_DIR}]\n"
            f"  {names.ENV_WORK_DIR}         scratch space [{names.WORK_DIR}]\n"
            f"  {names.ENV_TERMINATION_LOG}  where the last word goes [{names.TERMINATION_LOG}]\n"
            f"  {ENV_METRICS_PORT}     port of {names.PROGRESS_PATH} and {names.METRICS_PATH} [{names.METRICS_PORT}]\n"
            f"  {ENV_LOADER_WORKERS}   processes that prepare batches [by the number of CPUs]\n"
            f"exit codes:\n{codes}\n    1 a crash"
        ),
    ).parse_args()
    code = supervise(read_settings(os.environ))
    last_resort = threading.Timer(EXIT_SECONDS, os._exit, (code,))
    last_resort.daemon = True
    last_resort.start()
    return code


if __name__ == "__main__":
    sys.exit(main())
