"""`python -m diffusion_trainer`: one attempt of one job, told by a run file and a few environment variables."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_SECONDS = 30.0
"""After this long, threads or exit hooks of libraries hold the process up no longer."""
YIELDED = 75  # outcomes.ExitCode.YIELDED, before anything is imported


def main() -> int:
    """Train one attempt; return the exit code."""
    # A PID 1 without a handler never hears SIGTERM, and what follows takes a second to import.
    signal.signal(signal.SIGTERM, _leave)
    import argparse
    import threading

    from diffusion_trainer.settings import read_settings
    from diffusion_trainer.supervisor import supervise  # torch is imported when training begins

    parser = argparse.ArgumentParser(
        prog="python -m diffusion_trainer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train one attempt of a DiffusionTrainingJob.",
        epilog=_epilog(),
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="check storage, dataset, model and destination within seconds, without a GPU, and train nothing",
    )
    code = supervise(read_settings(os.environ), preflight=parser.parse_args().preflight)
    last_resort = threading.Timer(EXIT_SECONDS, os._exit, (code,))
    last_resort.daemon = True
    last_resort.start()
    return code


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(YIELDED)


def _epilog() -> str:
    from diffusion_api import names
    from diffusion_api.outcomes import OUTCOMES
    from diffusion_trainer.settings import ENV_LOADER_WORKERS, ENV_METRICS_PORT

    environment = {
        names.ENV_RUN_FILE: f"the RunConfig as JSON [{names.RUN_DIR}/{names.RUN_FILE}]",
        names.ENV_CREDENTIALS_DIR: f"folder of the storage's Secret [{names.CREDENTIALS_DIR}]",
        names.ENV_WORK_DIR: f"scratch space [{names.WORK_DIR}]",
        names.ENV_TERMINATION_LOG: f"where the last word goes [{names.TERMINATION_LOG}]",
        ENV_METRICS_PORT: f"port of {names.PROGRESS_PATH} and {names.METRICS_PATH}, 0 for any [{names.METRICS_PORT}]",
        ENV_LOADER_WORKERS: "processes that prepare batches [by the number of CPUs]",
    }
    codes = {outcome.exit_code: outcome.explanation for outcome in OUTCOMES if outcome.exit_code is not None}
    return "\n".join([
        "environment:",
        *(f"  {name:28}{text}" for name, text in environment.items()),
        "exit codes:",
        *(f"  {code:3d}  {text}" for code, text in codes.items()),
        "    1  a crash",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
