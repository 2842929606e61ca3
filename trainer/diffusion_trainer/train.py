"""The story of a run: load, resume, loop {batch, loss, step, evaluate, checkpoint, report}, export. No callbacks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_api.run import RunConfig
from diffusion_api.status import BestCheckpoint
from diffusion_trainer import data, export, optim, output
from diffusion_trainer.bookkeeping import Books, LeadersBooks, Stepped
from diffusion_trainer.cadence import Cadence
from diffusion_trainer.checkpoint import Entry, Ledger, Publisher, Retention, Target
from diffusion_trainer.courier import Courier
from diffusion_trainer.curves import Curves
from diffusion_trainer.data import Batch
from diffusion_trainer.device import gpu_errors
from diffusion_trainer.errors import CheckpointCorrupt
from diffusion_trainer.evaluation import Evaluator
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.overfitting import conclusion
from diffusion_trainer.peers import Peers, digest
from diffusion_trainer.preparation import Ready, prepare
from diffusion_trainer.progress import Board
from diffusion_trainer.reporting import Reporter
from diffusion_trainer.saving import Saver, Voices
from diffusion_trainer.settings import Settings
from diffusion_trainer.state import Trained, restore, snapshot
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
            stores = open_stores(run, credentials=settings.credentials)
            ledger = open_ledger(run, stores, on_warning=board.warn)
            publisher = None
            if peers.leads:
                target = fence(run, ledger, stores)  # older attempts are off now
                results = output.receipt(stores.state, stores.output, identity=spec.identity())
                if results:
                    conclude(board, results)
            if ended := peers.as_leader_says("delivered", how_it_ended(board) if board.state.output else None):
                board.update(**ended)
                LOG.info("an earlier attempt exported everything")
                return
            if peers.leads:
                publisher = stack.enter_context(
                    Publisher(target, staging=settings.work / "staging", on_warning=board.warn)
                )
            ready = prepare(run, stores, work=settings.work, board=board, peers=peers)
            step, curves = resume(run, ledger, ready, desk=desk, peers=peers)
        batches = stack.enter_context(open_batches(spec, ready, start_step=step, workers=settings.loader_workers))
        courier = stack.enter_context(Courier(stores.output, on_warning=board.warn))
        books = open_books(run, ready, curves, desk=desk, start_step=step, outlets=Outlets(stores, publisher, courier))
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
            peers=peers,
        )

        evaluator.evaluate_when_due(step)  # the last attempt may have been stopped before it could
        books.close(step)
        # All stop after the same step. The vote comes first: whoever is told to stop may lack an evaluation.
        while step < total and not peers.agree(stop.requested) and not evaluator.stops_early:
            wait_seconds, batch = timed(batches)
            loss = added_up(gradients(batch, ready), ready.trained, peers)
            learning_rate = optim.lr_at(step, spec.training.lr_schedule, peak=spec.learning_rate, total_steps=total)
            update = optim.apply_update(
                ready.trained.optimizer,
                learning_rate=learning_rate,
                max_grad_norm=spec.training.optimizer.max_grad_norm,
                loss=loss,
            )
            step += 1
            books.note(Stepped(step, loss, learning_rate, update.norm, wait_seconds))
            settings.failpoint.hit("step", step)
            evaluator.evaluate_when_due(step)
            books.close(step)

        if peers.agree(stop.requested):
            books.give_way(step, seconds_left=stop.seconds_left)
            raise Yielded
        books.finish(step)
        with stop.cut_short(), peers.leader_first("export"):
            board.update(stage="Exporting", detail="")
            if peers.leads:
                chosen = put_best_back(ledger, ready, evaluator, last=step, desk=desk)
                conclude(board, deliver(spec, stores, ready, chosen, folder=settings.work / "export"))
            board.update(**peers.as_leader_says("conclusion", how_it_ended(board)))  # told before the others come here


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


def put_best_back(ledger: Ledger, ready: Ready, evaluator: Evaluator, *, last: int, desk: Desk) -> Chosen:
    """With early stopping, put the best weights in place of the last ones; return which are in place."""
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


@dataclass(frozen=True)
class Outlets:
    """Where what is written down goes; there is a publisher of checkpoints in rank 0 only."""

    stores: Stores
    publisher: Publisher | None
    courier: Courier


def open_books(run: RunConfig, ready: Ready, curves: Curves, *, desk: Desk, start_step: int, outlets: Outlets) -> Books:
    """Return the books of this process."""
    spec, settings, board = run.spec, desk.settings, desk.board
    if outlets.publisher is None:
        return Books(board)
    events = settings.work / "tensorboard" if spec.tracking.tensorboard else None
    return LeadersBooks(
        board,
        curves,
        ready.plan,
        Reporter(board, desk.metrics, extent=ready.extent, start_step=start_step),
        Saver(
            outlets.publisher,
            partial(snapshot, trained=ready.trained, curves=curves, basis=ready.basis),
            cadence=Cadence.parse(spec.checkpoint.interval),
            start_step=start_step,
            voices=Voices(board, desk.metrics, outlets.stores.state.uri),
            best_step=board.state.best_checkpoint.step if board.state.best_checkpoint else None,
        ),
        Tracking(curves, outlets.courier, folder=events, attempt=run.attempt, start_step=start_step),
        desk.metrics,
        settings.failpoint,
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


def resume(run: RunConfig, ledger: Ledger, ready: Ready, *, desk: Desk, peers: Peers) -> tuple[int, Curves]:
    """Put back the newest checkpoint, if the job wants that; return its step and curves, or those of a fresh start.

    The leader decides which one it is, and all must begin with the same bits.
    """
    found, scratch = None, desk.settings.work
    with desk.metrics.checkpoint_duration.labels("load").time():
        if peers.leads:
            if run.spec.checkpoint.resume == "Never":
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


def timed(batches: Iterator[list[Batch]]) -> tuple[float, list[Batch]]:
    """Return how many seconds it took to get the next step's micro-batches, and them."""
    began = time.monotonic()
    batch = next(batches)
    return time.monotonic() - began, batch


def gradients(batches: Sequence[Batch], ready: Ready) -> Tensor:
    """Add up the gradients of one optimizer step; return the loss of its batch, still on the device.

    Every image weighs 1 / batchSize, so the sum over micro-batches is the batch's mean however it is cut up.
    """
    total = torch.zeros((), device=ready.device.torch)
    for waiting in batches:
        batch = waiting.to(ready.device.torch)
        weights = ready.objective.weights(batch.times) * batch.weights
        loss = (weights * ready.errors(batch)).sum() / ready.extent.batch_size
        ready.device.accelerator.backward(loss)
        total += loss.detach()
    return total


def added_up(loss: Tensor, trained: Trained, peers: Peers) -> Tensor:
    """Replace the gradients by their sums over all processes; return the loss of the whole batch.

    Every process has weighed its images by 1 / batchSize, so sums are what one process would have got.
    """
    if peers.world_size == 1:
        return loss
    parameters = [parameter for parameter in trained.parameters.values() if parameter.grad is not None]
    *sums, total = peers.add_up([*(p.grad for p in parameters if p.grad is not None), loss])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient
    return total


def deliver(spec: TrainerSpec, stores: Stores, ready: Ready, chosen: Chosen, *, folder: Path) -> output.Results:
    """Export the weights in every format, upload them, and leave the receipt."""
    paths = []
    for name in spec.output.formats:
        prefix, write = export.writer_of(spec.trains, name)
        (folder / prefix).mkdir(parents=True, exist_ok=True)
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
