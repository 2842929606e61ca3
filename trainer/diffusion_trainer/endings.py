"""From how a run ended to an exit code and the words that go with it. The only place that knows both."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffusion_api.outcomes import ExitCode
from diffusion_api.run import LastWord
from diffusion_trainer.errors import TrainerError
from diffusion_trainer.progress import Board
from diffusion_trainer.stopping import Yielded

CRASH = 1
_MESSAGE_LIMIT, _WARNING_LIMIT = 1024, 4
_TRACE_LINES = 12
_CONSEQUENCES: dict[int, int] = {ExitCode.COLLECTIVE_TIMEOUT: 1, ExitCode.YIELDED: 2, ExitCode.DONE: 3}


@dataclass(frozen=True)
class Ending:
    """How it ended: `code` is one of `ExitCode`, or 1 for a crash."""

    code: int
    message: str
    lines: tuple[str, ...] = ()


def ending_of(error: BaseException | None) -> Ending:
    """Return the ending that an exception means; None is success."""
    if error is None:
        return Ending(ExitCode.DONE, "all steps are done and the results are exported")
    if isinstance(error, Yielded):
        return Ending(ExitCode.YIELDED, "told to stop: the next attempt goes on from the newest checkpoint")
    if isinstance(error, TrainerError) and error.exit_code is not None:
        return Ending(error.exit_code, str(error))
    trace = tuple("".join(traceback.format_exception(error)).splitlines())
    return Ending(CRASH, f"{type(error).__name__}: {error}", trace[-_TRACE_LINES:])


def success(board: Board) -> Ending:
    """Return the ending of a run that exported everything, in its own words where it has some."""
    return Ending(ExitCode.DONE, board.state.conclusion or ending_of(None).message)


def root_cause(endings: Sequence[Ending]) -> Ending:
    """Return the ending that explains the others: those of processes that trained together, the earliest first.

    That others are gone, or that one was told to stop because of them, is a consequence.
    """
    return min(endings, key=lambda ending: _CONSEQUENCES.get(ending.code, 0))


def last_word(ending: Ending, board: Board, *, log_lines: Iterable[str], log: str | None = None) -> str:
    """Return the termination message: JSON that the kubelet keeps whole. `log` is where all of the log is."""
    state = board.state
    word = LastWord(
        attempt=board.attempt,
        exit_code=ending.code,
        message=ending.message[:_MESSAGE_LIMIT],
        step=state.step,
        resumed_from_step=state.resumed_from_step,
        latest_checkpoint=state.latest_checkpoint,
        best_checkpoint=state.best_checkpoint,
        progress=state.progress,
        micro_batch_size=state.micro_batch_size,
        output=state.output[:8] if ending.code == ExitCode.DONE else (),
        stopped_early_at=state.stopped_early_at,
        preflight=state.preflight,
        warnings=state.warnings[-_WARNING_LIMIT:],
        log=log,
        last_lines="\n".join((*log_lines, *ending.lines)),
    )
    return word.to_message()
