"""PID 1 of the trainer's container: starts everything, hears SIGTERM, notices hangs, and has the last word.

A run of one process is trained in this very process. Of several, those of this pod are started by `launching`, and
each of them is supervised in the same way: it has a watchdog and a last word, from which the pod's is made here.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from pydantic import ValidationError

from diffusion_api.outcomes import ExitCode
from diffusion_api.run import RunConfig
from diffusion_trainer.autopsy import Recorder, keep_log
from diffusion_trainer.endings import Ending, ending_of, last_word, success
from diffusion_trainer.errors import BadConfig
from diffusion_trainer.launching import adopt, introduce, launch, word_file, words_of
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.progress import Board, ProgressServer
from diffusion_trainer.settings import Place, Settings, read_place, settle
from diffusion_trainer.stopping import StopSignal, Yielded

LOG = logging.getLogger("diffusion_trainer")
RESERVED_SHARE = 0.1
"""Share of the grace period that is kept for the last word: when only this is left, the process ends itself."""
WATCH_SECONDS = 1.0
PEERS_MARGIN_SECONDS = 60.0
"""How much longer than a hang a collective may take: who hangs says so before others say that they wait."""
C_CODE_SECONDS = 60.0
"""How much later than the watchdog thread the one without Python strikes: only when the thread cannot run."""
_LOG_LINES = 20


def supervise(settings: Settings, *, preflight: bool = False, place: Place | None = None) -> int:
    """Do one attempt, or only its preflight, and return the exit code.

    The termination message is written whatever happens. `place` is that of one training process among several.
    """
    lines, recorder = start_log(place.rank if place else 0)
    board = Board(attempt=0)
    try:
        run = read_run(settings.run_file)
    except BadConfig as error:
        return finish(ending_of(error), board, settings=settings, lines=lines, keep=_no_log)
    board.attempt = 0 if preflight else run.attempt
    stop = StopSignal(grace_seconds=run.grace_period_seconds)

    keep = _no_log if preflight else partial(_keep_log, run, recorder, settings=settings, place=place)

    def leave(ending: Ending) -> None:
        """End the process from another thread than the one that trains."""
        if place is None:
            adopt(board, words_of(settings.work))
        os._exit(finish(ending, board, settings=settings, lines=lines, keep=keep))

    def hear(_number: int, _frame: FrameType | None) -> None:
        stop.request()  # and not a word to the log, which may be in the middle of a line

    # Before anything slow: a PID 1 without a handler does not even see the signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hear)
    ending = ending_of(None)
    try:
        with Watchdog(board, stop, stall_seconds=run.stall_seconds, leave=leave):
            if preflight:
                ending = _preflight(run, settings, board=board, stop=stop)
            elif run.world_size > 1 and place is None:
                with stop.cut_short():
                    settle(os.environ, work=settings.work, deterministic=run.spec.training.deterministic)
                ending = launch(run, settings, entry=be_one_of_several, board=board, stop=stop)
            else:
                ending = _attempt(run, settings, board=board, stop=stop, place=place)
    except (Exception, Yielded) as error:
        ending = ending_of(error)
        if ending.lines:
            LOG.exception("unexpected end")
    return finish(ending, board, settings=settings, lines=lines, keep=keep)


def _no_log() -> str | None:
    """Keep nothing: what a preflight finds is in its last word."""


def _keep_log(run: RunConfig, recorder: Recorder, *, settings: Settings, place: Place | None) -> str | None:
    """Put the log into the bucket; of several processes each does it for itself, and not what started them."""
    if run.world_size > 1 and place is None:
        return next((word.log for word in words_of(settings.work).values() if word.log), None)
    rank = place.rank if place else 0
    return keep_log(run, recorder.content(), rank=rank, credentials=settings.credentials)


def _preflight(run: RunConfig, settings: Settings, *, board: Board, stop: StopSignal) -> Ending:
    LOG.info("preflight of %s/%s", run.job.namespace, run.job.name)
    with stop.cut_short():
        from diffusion_trainer.preflight import preflight  # within the reach of the handlers

        settle(os.environ, work=settings.work, deterministic=False)
        return preflight(run, settings, board=board)


def be_one_of_several(settings: Settings) -> int:
    """Be one training process of this pod, from its first to its last moment; return 0 or 75, or never."""
    place = read_place(os.environ)
    introduce(settings.work, place.local_rank)
    mine = replace(
        settings,
        termination_log=word_file(settings.work, place.local_rank),
        failpoint=settings.failpoint.of(place.rank),
    )
    code = supervise(mine, place=place)
    if code not in {ExitCode.DONE, ExitCode.YIELDED}:
        os._exit(code)  # collectives that are under way would hold the interpreter up
    return code


def _attempt(run: RunConfig, settings: Settings, *, board: Board, stop: StopSignal, place: Place | None) -> Ending:
    """Train with the door open to readers of the progress."""
    LOG.info("attempt %d of %s/%s", run.attempt, run.job.namespace, run.job.name)
    with stop.cut_short():
        settle(os.environ, work=settings.work, deterministic=run.spec.training.deterministic)
    metrics = Metrics()
    with ExitStack() as stack:
        if place is None or place.rank == 0:
            _serve(stack, settings.metrics_port, board=board, metrics=metrics)
        with stop.cut_short():
            from diffusion_trainer.peers import Peers, open_peers
            from diffusion_trainer.train import Desk, train  # heavy: after the handlers, and within their reach

            peers = Peers()
            if place is not None:
                several = stack.enter_context(
                    open_peers(
                        place,
                        on_gpu=run.device == "CUDA",
                        timeout_seconds=run.stall_seconds + PEERS_MARGIN_SECONDS,
                        alive=board.update,
                    )
                )
                stack.enter_context(several.spread_stop(requested=lambda: stop.requested, request=_ask_to_stop))
                peers = several
        train(run, Desk(settings, board, metrics, stop), peers)
    return success(board)


def _serve(stack: ExitStack, port: int, *, board: Board, metrics: Metrics) -> None:
    try:
        server = stack.enter_context(ProgressServer(port, board=board, metrics=metrics.text))
        LOG.info("progress and metrics on port %d", server.server_port)
    except OSError as error:
        board.warn(f"port {port} is taken ({error.strerror}): progress and metrics are not served")


def _ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # the handler, and so the exception, belong to the main thread


def read_run(path: Path) -> RunConfig:
    """Return what the operator says. Raises `BadConfig`."""
    try:
        return RunConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadConfig(f"read the run from {path}: {error.strerror}; the operator mounts it there") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadConfig(
            f"the run in {path}: {where}: {first['msg']} ({error.error_count()} errors in all); trainer and operator "
            "must be of one release"
        ) from error


def finish(
    ending: Ending,
    board: Board,
    *,
    settings: Settings,
    lines: deque[str],
    keep: Callable[[], str | None],
) -> int:
    """Write the termination message and return the exit code. `keep` puts the log of a failure where it stays."""
    well = ending.code in {ExitCode.DONE, ExitCode.YIELDED}
    LOG.log(logging.INFO if well else logging.ERROR, "exit %d: %s", ending.code, ending.message)
    told = tuple(lines)
    _say(last_word(ending, board, log_lines=told), settings.termination_log)
    # The word is said before the log is put away, which may take longer than the pod may live.
    if not well and (log := keep()):
        _say(last_word(ending, board, log_lines=told, log=log), settings.termination_log)
    sys.stdout.flush()
    sys.stderr.flush()
    return int(ending.code)


def _say(word: str, file: Path) -> None:
    try:
        file.write_text(word)
    except OSError as error:
        LOG.warning("write %s: %s", file, error.strerror)


class Watchdog:
    """A thread that ends the process when it shows no sign of life, or outlives its grace period."""

    def __init__(
        self,
        board: Board,
        stop: StopSignal,
        *,
        stall_seconds: float,
        leave: Callable[[Ending], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._stop = stop
        self._stall_seconds = stall_seconds
        self._leave = leave
        self._monotonic = monotonic
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def verdict(self) -> Ending | None:
        """Return how the process must end now, None while it may go on."""
        if self._stop.requested:
            if self._stop.seconds_left <= RESERVED_SHARE * self._stop.grace_seconds:
                return Ending(ExitCode.YIELDED, "told to stop: the grace period is over; the next attempt goes on")
            return None
        silent = self._monotonic() - self._board.last_beat
        if silent <= self._stall_seconds:
            return None
        state = self._board.state
        return Ending(
            ExitCode.HANG,
            f"no progress for {silent:.0f} s ({state.stage}: {state.detail or 'between two steps'}); raise "
            "runPolicy.stallSeconds if that may really take so long",
        )

    def _watch(self) -> None:
        told = False
        while not self._done.wait(WATCH_SECONDS):
            # Code that never lets go of the interpreter stops this thread too; then the one in C ends the process.
            faulthandler.dump_traceback_later(self._stall_seconds + C_CODE_SECONDS, exit=True)
            if self._stop.requested and not told:
                told = True
                LOG.info("told to stop, within %.0f s", self._stop.grace_seconds)
            if ending := self.verdict():
                if ending.code == ExitCode.HANG:
                    faulthandler.dump_traceback(all_threads=True)
                self._leave(ending)
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()


class _Tail(logging.Handler):
    """Keeps the last lines of the log for the termination message."""

    def __init__(self, lines: deque[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.extend(self.format(record).splitlines())


def start_log(rank: int = 0) -> tuple[deque[str], Recorder]:
    """Log to standard output, one plain line per event in UTC; return the last lines, and what keeps many more.

    All processes of a pod share its log; lines of others than rank 0 name theirs.
    """
    lines: deque[str] = deque(maxlen=_LOG_LINES)
    form = logging.Formatter(
        f"%(asctime)sZ %(levelname)s {f'rank {rank}: ' if rank else ''}%(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
    )
    form.converter = time.gmtime
    root = logging.getLogger()
    root.handlers.clear()
    recorder = Recorder()
    for handler in (logging.StreamHandler(sys.stdout), _Tail(lines), recorder):
        handler.setFormatter(form)
        root.addHandler(handler)
    root.setLevel(logging.WARNING)  # of libraries only what matters
    LOG.setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    return lines, recorder
