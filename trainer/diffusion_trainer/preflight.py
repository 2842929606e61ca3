"""What can be known to be wrong with a run before it has a GPU: storage, dataset, model, destination.

Takes seconds on a CPU, downloads no weights and never imports torch. It changes nothing but a probe object that it
deletes again, so that it can run any number of times, beside a training attempt too.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from diffusion_api.outcomes import OF_CODE, Action, ExitCode
from diffusion_api.run import PreflightReport, RunConfig
from diffusion_trainer.data.folders import folders_of
from diffusion_trainer.data.survey import Survey, survey
from diffusion_trainer.endings import Ending
from diffusion_trainer.errors import BadConfig, StorageUnavailable, TrainerError
from diffusion_trainer.models.inspection import check_fit
from diffusion_trainer.models.survey import Found, look_at
from diffusion_trainer.objectstore import ObjectStore
from diffusion_trainer.objectstore.settings import TransferSettings
from diffusion_trainer.progress import Board
from diffusion_trainer.scoring.files import check_library, fetch_clip
from diffusion_trainer.settings import Settings
from diffusion_trainer.stores import open_stores

ATTEMPT = 0
"""Number under which a preflight speaks: it comes before the first attempt."""
_FIELDS = ("dataset.", "model.", "output.", "method:", "fineTune.", "validation.", "training.")
"""What a message that names its field already begins with."""
TRANSFER = TransferSettings(retries=2)
"""Patience with a storage that does not answer: a preflight that fails of it is tried again by whoever started it."""


def preflight(
    run: RunConfig, settings: Settings, *, board: Board, monotonic: Callable[[], float] = time.monotonic
) -> Ending:
    """Check everything; the report is on the board, and the ending is a success.

    Raises:
        TrainerError: what was found, each finding with its field. A finding that trying again cannot mend comes before
            others, and gives the exit code.

    """
    started = monotonic()
    stores = open_stores(run, credentials=settings.credentials, settings=TRANSFER)
    findings: list[TrainerError] = []
    seen, found = None, None
    try:
        board.say(f"output.destination: probing {stores.state.uri}")
        probe(stores.state)
    except TrainerError as error:
        findings.append(_named("output.destination", error))
    try:
        board.say(f"model.source: reading {stores.model.uri}")
        complete = not run.spec.begins_anywhere
        found = look_at(run.spec.model, stores.model, work=settings.work, complete=complete)
        check_fit(found.family, run.spec, predicts=found.predicts)
    except TrainerError as error:
        findings.append(_named("model.source", error))
    try:
        board.say(f"dataset: reading {', '.join(store.uri for store in stores.datasets)}")
        seen = survey(run.spec.dataset, folders_of(run.spec, stores.datasets), work=settings.work)
    except TrainerError as error:
        findings.append(_named("dataset.source", error))
    if stores.scores is not None:
        try:
            board.say(f"validation.scores.model: reading {stores.scores.uri}")
            check_library()
            fetch_clip(stores.scores, settings.work, weights=False)
        except TrainerError as error:
            findings.append(_named("validation.scores.model", error))
    report = _report(found, seen, seconds=monotonic() - started)
    board.update(preflight=report)
    for text in seen.warnings if seen else ():
        board.warn(text)
    if findings:
        raise _first(findings)
    return Ending(ExitCode.DONE, f"preflight passed: {_sentence(report)}")


def probe(store: ObjectStore) -> None:
    """Write, read and delete an object, and try conditional writes.

    Raises:
        StorageError: one of them was refused.
        BadConfig: the store ignores the conditions of conditional writes, on which checkpoints rest.
        StorageUnavailable: what was read is not what was written.

    """
    key, content = f"preflight-{secrets.token_hex(8)}", secrets.token_bytes(32)
    store.put(key, content, if_absent=True)
    try:
        read = store.get(key)
    finally:
        store.delete(key)
    if read != content:
        raise StorageUnavailable(f"{store.uri}{key} was read back with another content; check the store")
    if not store.capabilities().compare_and_swap:
        raise BadConfig(
            f"{store.uri} ignores conditional writes (If-None-Match, If-Match), without which two attempts could "
            "overwrite each other's checkpoints; use a store, or a newer release of it, that honours them"
        )


def _named(field: str, error: TrainerError) -> TrainerError:
    """Return the error with the field that it is about in front; messages that name a field already stay."""
    text = str(error)
    return error if text.startswith(_FIELDS) else type(error)(f"{field}: {text}")


def _first(findings: list[TrainerError]) -> TrainerError:
    """Return the finding to end with, whose message tells of the others as well."""

    def heals(error: TrainerError) -> bool:
        return error.exit_code is None or OF_CODE[error.exit_code].action != Action.FAIL

    ordered = sorted(findings, key=heals)  # stable
    others = "".join(f"; moreover: {error}" for error in ordered[1:])
    return type(ordered[0])(f"{ordered[0]}{others}")


def _report(found: Found | None, seen: Survey | None, *, seconds: float) -> PreflightReport:
    return PreflightReport(
        family=found.family if found else None,
        architecture=found.architecture if found else None,
        images=seen.images if seen else 0,
        complete=seen.complete if seen else False,
        sampled=seen.sampled if seen else 0,
        bytes=seen.size_bytes if seen else 0,
        seconds=round(seconds, 2),
    )


def _sentence(report: PreflightReport) -> str:
    more = "" if report.complete else "at least "
    return (
        f"{report.architecture or report.family} model, {more}{report.images} images ({report.bytes / 1e6:.1f} MB), "
        f"{report.sampled} decoded, destination writable, in {report.seconds:.1f} s"
    )
