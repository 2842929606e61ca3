"""The process that uploads. A process and not a thread: hashing and TLS must not take turns with the training loop.

It imports no torch, so that it starts fast and stays small.
"""

from __future__ import annotations

import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from diffusion_trainer.checkpoint.ledger import Ledger
from diffusion_trainer.checkpoint.messages import Committed, Failed, Job, Target, Warned
from diffusion_trainer.checkpoint.staging import in_use
from diffusion_trainer.errors import TrainerError


def serve(connection: Connection, target: Target, staging: Path) -> None:
    """Publish job after job until the trainer closes its end. An upload in flight is finished also when it died."""
    # The trainer decides when to end: whoever signals the process group (Ctrl-C) must not break off an upload.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with in_use(staging):
        ledger: Ledger | None = None
        try:
            while (job := connection.recv()) is not None:
                try:
                    ledger = ledger or _opened(target, connection)
                    connection.send(_published(ledger, job))
                except TrainerError as error:
                    if error.__cause__ is not None:  # pickle drops it
                        error.add_note(f"caused by {type(error.__cause__).__name__}: {error.__cause__}")
                    connection.send(Failed(error))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the trainer is gone


def _opened(target: Target, connection: Connection) -> Ledger:
    ledger = Ledger(
        target.open_store(),
        attempt=target.lease.attempt,
        run_spec_sha=target.run_spec_sha,
        retention=target.retention,
        on_warning=lambda text: connection.send(Warned(text)),
    )
    ledger.adopt(target.lease)
    return ledger


def _published(ledger: Ledger, job: Job) -> Committed:
    begun = time.monotonic()
    files = {name: job.folder / name for name in job.names}
    size = sum(path.stat().st_size for path in files.values())
    entry = ledger.publish_files(job.step, files, best=job.best)
    return Committed(entry, time.monotonic() - begun, size)
