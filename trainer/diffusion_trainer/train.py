"""The story of a run: load, resume, loop {batch, loss, step, evaluate, checkpoint, report}, export. No callbacks."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from diffusion_api.job import TrainerSpec
from diffusion_api.run import RunConfig
from diffusion_api.status import BestCheckpoint
from diffusion_trainer import data, export, output
from diffusion_trainer.bookkeeping import Books, LeadersBooks, Stepped
from diffusion_trainer.cadence import Cadence
from diffusion_trainer.checkpoint import Entry, Ledger, Publisher, Retention, Target
from diffusion_trainer.courier import Courier
from diffusion_trainer.curves import Curves
from diffusion_trainer.data import Batch
from diffusion_trainer.device import gpu_errors
from diffusion_trainer.errors import CheckpointCorrupt
from diffusion_trainer.evaluation import Evaluator
from diffusion_trainer.guard import RollBack
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.objectstore.settings import TransferSettings
from diffusion_trainer.overfitting import conclusion
from diffusion_trainer.peers import Peers, digest
from diffusion_trainer.preparation import Ready, prepare
from diffusion_trainer.progress import Board
from diffusion_trainer.reporting import Reporter
from diffusion_trainer.saving import Saver, Voices, checkpoint_of
from diffusion_trainer.settings import Settings
from diffusion_trainer.state import restore, snapshot
from diffusion_trainer.stepping import Stepper, fitting_share
from diffusion_trainer.stopping import StopSignal, Yielded
from diffusion_trainer.stores import Stores, open_stores
from diffusion_trainer.tracking import Tracking

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Desk:
    """What a run has besides its RunConfig: settings, the board it reports to, and the signal that stops it."""

    settings: Settings
    board: Board
    metrics: Metrics
    stop: StopSignal


def train(run: RunConfig, desk: Desk, peers: Peers) -> None:
    """Do what is left of a run, from the newest checkpoint to the exported files, which end up on the board.

    Raises `Yielded` when it was told to stop and did, otherwise errors of `diffusion_trainer.errors`.
    """
    spec, settings, board, stop = run.spec, desk.settings, desk.board, desk.stop
    with gpu_errors(), ExitStack() as stack:
        with stop.cut_short():
            stores = open_stores(run, credentials=settings.credentials, settings=TransferSettings(moved=board.update))
            ledger = open_ledger(run, stores, on_warning=board.warn)
            publisher = None
            if peers.leads:
                target = fence(run, ledger, stores)  # older attempts are off now
                results = output.receipt(stores.state, stores.output, identity=spec.identity())
                if results:
                    conclude(board, results)
            if told := peers.as_leader_says("delivered", how_it_ended(board) if board.state.output else None):
                board.update(**told)
                LOG.info("an earlier attempt exported everything")
                return
            if peers.leads:
                publisher = stack.enter_context(
                    Publisher(target, staging=settings.work / "staging", on_warning=board.warn)
                )
            ready = prepare(run, stores, work=settings.work, board=board, peers=peers)
            ready = replace(ready, share=fitting_share(spec, ready, peers))
        work = Work(run, desk, peers, stores, ledger, publisher)
        stepper = Stepper(spec, ready, peers=peers, tell=partial(tell_of_micro_batch, board))
        ended = None
        while ended is None:
            try:
                ended = take_steps(work, ready, stepper)
            except RollBack as reason:
                ready = go_back(work, ready, stepper, reason)
        with stop.cut_short(), peers.leader_first("export"):
            board.update(stage="Exporting", detail="")
            if peers.leads:
                chosen = put_best_back(ledger, ready, ended, desk=desk)
                conclude(board, deliver(spec, stores, ready, chosen, folder=settings.work / "export"))
            board.update(**peers.as_leader_says("conclusion", how_it_ended(board)))  # told before the others come here


@dataclass(frozen=True)
class Work:
    """What all steps of a run have in common; there is a publisher of checkpoints in rank 0 only."""

    run: RunConfig
    desk: Desk
    peers: Peers
    stores: Stores
    ledger: Ledger
    publisher: Publisher | None


@dataclass(frozen=True)
class Ended:
    """After which step the training has ended, and who evaluated it."""

    step: int
    evaluator: Evaluator


def take_steps(work: Work, ready: Ready, stepper: Stepper) -> Ended:
    """Take all steps from the newest checkpoint on. Raises `Yielded`, `RollBack`, errors of the trainer."""
    run, desk, peers = work.run, work.desk, work.peers
    spec, settings, board, stop = run.spec, desk.settings, desk.board, desk.stop
    with stop.cut_short():
        step, curves = resume(work, ready)
    with ExitStack() as stack:
        batches = stack.enter_context(open_batches(spec, ready, start_step=step, workers=settings.loader_workers))
        courier = stack.enter_context(Courier(work.stores.output, on_warning=board.warn))
        books = open_books(work, ready, curves, courier, start_step=step)
        total = ready.extent.total_steps
        evaluator = Evaluator(
            spec=spec,
            lock=ready.plan.lock,
            cache=ready.cache,
            family=ready.family,
            attached=ready.attached,
            errors=ready.errors,
            objective=ready.objective,
            batch_size=ready.share.micro_batch_size,
            total_steps=total,
            curves=curves,
            courier=courier,
            stop=stop,
            report=board.say,
            warn=board.warn,
            shown=ready.trained.shown,
            peers=peers,
            scorer=ready.scorer,
        )
        books.begin(step)
        evaluator.evaluate_when_due(step)  # the last attempt may have been stopped before it could
        close(books, step, work, total=total)
        # All stop after the same step. The vote comes first: whoever is told to stop may lack an evaluation.
        while step < total and not peers.agree(stop.requested) and not evaluator.stops_early:
            wait_seconds, batch = timed(batches)
            taken = stepper.take(batch, step)
            step += 1
            books.note(Stepped(step, taken, wait_seconds))
            settings.failpoint.hit("step", step)
            evaluator.evaluate_when_due(step)
            close(books, step, work, total=total)

        if peers.agree(stop.requested):
            books.give_way(step, seconds_left=stop.seconds_left)
            raise Yielded
        stepper.finish()
        books.finish(step)
    return Ended(step, evaluator)


def close(books: Books, step: int, work: Work, *, total: int) -> None:
    """Close the books of a step.

    Where the leader may have to wait until an earlier checkpoint is uploaded, the others wait for it here, however long
    that takes, and not in the collective that comes next, which times out.
    """
    first = work.peers.leader_first(f"books/{step}") if may_wait(work.run.spec, step, total=total) else nullcontext()
    with first:
        books.close(step)


def may_wait(spec: TrainerSpec, step: int, *, total: int) -> bool:
    """Return whether a checkpoint after `step` may have to be made at once. It depends on nothing but the step.

    For all have to answer alike, also those that were stopped within an evaluation.
    """
    cadence = Cadence.parse(spec.checkpoint.interval)
    steps = [spec.validation.every_steps, *([cadence.steps] if cadence.steps is not None else [])]
    return step == total or any(step % interval == 0 for interval in steps)


def go_back(work: Work, ready: Ready, stepper: Stepper, reason: RollBack) -> Ready:
    """Prepare for going on from the newest checkpoint with half the learning rate; return what is ready for that."""
    guard, peers = ready.trained.guard, work.peers
    guard.go_back()
    work.desk.board.warn(f"back to the newest checkpoint, with {guard.factor:g} of the learning rate: {reason}")
    if work.publisher is not None:
        work.publisher.flush(deadline_seconds=math.inf)
    work.ledger.look_again()
    peers.begin_chapter(f"back-{guard.roll_backs}")
    return replace(ready, share=replace(ready.share, micro_batch_size=stepper.micro_batch_size))


def conclude(board: Board, results: output.Results) -> None:
    """Put what was exported on the board, and how it came to that."""
    board.update(
        output=output.condensed(results.files), conclusion=results.conclusion, stopped_early_at=results.stopped_early_at
    )


def how_it_ended(board: Board) -> dict[str, Any]:
    """Return what every process says of a run that has ended well."""
    return {"conclusion": board.state.conclusion, "stopped_early_at": board.state.stopped_early_at}


@dataclass(frozen=True)
class Chosen:
    """The weights to export: those after `step`, which is in the conclusion where it is not the last one."""

    step: int
    conclusion: str = ""
    stopped_early_at: int | None = None


def put_best_back(ledger: Ledger, ready: Ready, ended: Ended, *, desk: Desk) -> Chosen:
    """With early stopping, put the best weights in place of the last ones; return which are in place."""
    evaluator, last = ended.evaluator, ended.step
    rule = evaluator.spec.validation.early_stopping
    if rule is None:
        return Chosen(last)
    stopped, total, step = evaluator.stopped_after, evaluator.total_steps, last
    try:
        found = ledger.load_best(scratch=desk.settings.work)
        if found is not None and found.step != last:
            restore(found, ready.trained, basis=ready.basis)
            step = found.step
    except CheckpointCorrupt as error:
        desk.board.warn(f"the last weights are exported, for the best checkpoint is damaged: {error}")
    loss = next((one.loss for one in evaluator.curves.evaluations if one.step == step), None)
    text = conclusion(rule, stopped=stopped, total=total, exported=step, loss=loss)
    return Chosen(step, text, stopped)


def open_books(work: Work, ready: Ready, curves: Curves, courier: Courier, *, start_step: int) -> Books:
    """Return the books of this process."""
    run, desk = work.run, work.desk
    spec, settings, board = run.spec, desk.settings, desk.board
    if work.publisher is None:
        return Books(board)
    events = settings.work / "tensorboard" if spec.tracking.tensorboard else None
    return LeadersBooks(
        board,
        curves,
        ready.plan,
        Reporter(board, desk.metrics, extent=ready.extent, start_step=start_step),
        Saver(
            work.publisher,
            partial(snapshot, trained=ready.trained, curves=curves, basis=ready.basis),
            cadence=Cadence.parse(spec.checkpoint.interval),
            start_step=start_step,
            voices=Voices(board, desk.metrics, work.stores.state.uri),
            best_step=board.state.best_checkpoint.step if board.state.best_checkpoint else None,
        ),
        Tracking(curves, courier, folder=events, attempt=run.attempt, start_step=start_step),
        desk.metrics,
        settings.failpoint,
        ready.trained.guard,
    )


def open_ledger(run: RunConfig, stores: Stores, *, on_warning: Callable[[str], None]) -> Ledger:
    """Return the ledger of the job's checkpoints, without its fence."""
    return Ledger(
        stores.state,
        attempt=run.attempt,
        run_spec_sha=run.spec.identity(),
        retention=Retention(keep_last=run.spec.checkpoint.keep_last),
        on_warning=on_warning,
    )


def fence(run: RunConfig, ledger: Ledger, stores: Stores) -> Target:
    """Take the fence and return the target of new checkpoints. Raises `Fenced`."""
    retention = Retention(keep_last=run.spec.checkpoint.keep_last)
    return Target(stores.open_state, ledger.acquire().lease, run.spec.identity(), retention)


def resume(work: Work, ready: Ready) -> tuple[int, Curves]:
    """Put back the newest checkpoint, if the job wants that; return its step and curves, or those of a fresh start.

    The leader decides which one it is, and all must begin with the same bits.
    """
    run, ledger, desk, peers = work.run, work.ledger, work.desk, work.peers
    found, scratch = None, desk.settings.work
    with desk.metrics.checkpoint_duration.labels("load").time():
        if peers.leads:
            if run.spec.checkpoint.resume == "Never" and not ready.trained.guard.roll_backs:
                ledger.start_over()
            found = ledger.load(scratch=scratch)
        entry = peers.as_leader_says("checkpoint", asdict(ledger.loaded) if ledger.loaded else None)
        if entry and not peers.leads:
            found = ledger.read(Entry(**entry), scratch=scratch)
    curves = restore(found, ready.trained, basis=ready.basis) if found else Curves()
    if pinned := ledger.best if peers.leads else None:
        best = BestCheckpoint(step=pinned.step, metric=pinned.metric, value=pinned.value)
        desk.board.update(best_checkpoint=best)
    if peers.world_size > 1:
        peers.check_same("start", beginning(run, ready))
    if entry and peers.leads:  # an older one than was told of before, where the newest was damaged
        desk.board.update(latest_checkpoint=checkpoint_of(Entry(**entry), root=work.stores.state.uri))
    step = found.step if found else 0
    total, micro_batch = ready.extent.total_steps, ready.share.micro_batch_size
    resumed_from = step if found else None
    desk.board.update(
        stage="Running", detail="", step=step, resumed_from_step=resumed_from, micro_batch_size=micro_batch
    )
    LOG.info("from step %d to %d, micro-batch %d on %s", step, total, micro_batch, ready.device.torch)
    return step, curves


def beginning(run: RunConfig, ready: Ready) -> dict[str, str]:
    """Return the hashes of what all processes must begin with."""
    return {
        "spec": run.spec.identity(),
        "dataset": ready.basis.dataset,
        "base model": json.dumps(dict(ready.basis.model), sort_keys=True),
        "set of weights": digest(ready.trained.weights()),
    }


@contextmanager
def open_batches(spec: TrainerSpec, ready: Ready, *, start_step: int, workers: int) -> Iterator[Iterator[list[Batch]]]:
    """Open the micro-batches of every step that is left.

    The loader's workers are forked before this returns, and it must be entered before the courier's thread works: a
    fork keeps whatever that thread holds at the moment, such as the lock of a file store, for as long as it lives.
    """
    batches: Any = data.open_loader(  # a generator
        ready.plan,
        ready.cache,
        steps=range(start_step, ready.extent.total_steps),
        share=ready.share,
        objective=ready.objective,
        noise_offset=spec.training.objective.noise_offset,
        workers=workers,
    )
    with closing(batches):
        first = list(islice(batches, 1))
        yield chain(first, batches)


def tell_of_micro_batch(board: Board, sentence: str, size: int) -> None:
    """Say that micro-batches are smaller from now on."""
    board.warn(sentence)
    board.update(micro_batch_size=size)


def timed(batches: Iterator[list[Batch]]) -> tuple[float, list[Batch]]:
    """Return how many seconds it took to get the next step's micro-batches, and them."""
    began = time.monotonic()
    batch = next(batches)
    return time.monotonic() - began, batch


def deliver(spec: TrainerSpec, stores: Stores, ready: Ready, chosen: Chosen, *, folder: Path) -> output.Results:
    """Export the weights in every format, upload them, and leave the receipt."""
    paths = []
    for name in spec.output.formats:
        prefix, write = export.writer_of(spec.trains, name)
        (folder / prefix).mkdir(parents=True, exist_ok=True)
        with ready.trained.shown():
            paths += write(ready.trained.weights(), ready.family, spec, folder=folder / prefix)
    card = folder / output.CARD
    card.write_text(
        output.model_card(
            spec,
            family=ready.family.name,
            images=len(ready.plan.lock.instances),
            steps=chosen.step,
        )
    )
    files = output.upload(stores.output, folder, [*paths, card])
    results = output.Results(files, chosen.conclusion, chosen.stopped_early_at)
    output.sign(stores.state, results, identity=spec.identity())
    return results
