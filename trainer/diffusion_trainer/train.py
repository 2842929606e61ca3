"""The story of a run: load, resume, loop {batch, loss, step, evaluate, checkpoint, report}, export. No callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_api.run import RunConfig
from diffusion_api.status import OutputFile
from diffusion_trainer import data, optim, output
from diffusion_trainer.cadence import Cadence
from diffusion_trainer.checkpoint import Ledger, Publisher, Retention, Target
from diffusion_trainer.courier import Courier
from diffusion_trainer.curves import Curves, first_diverged
from diffusion_trainer.data import Batch, Plan
from diffusion_trainer.device import gpu_errors
from diffusion_trainer.errors import Diverged
from diffusion_trainer.evaluation import Evaluator
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.preparation import EXPORTERS, Ready, prepare
from diffusion_trainer.progress import Board
from diffusion_trainer.reporting import Reporter
from diffusion_trainer.saving import Saver, Voices
from diffusion_trainer.settings import Settings
from diffusion_trainer.state import restore, snapshot
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


def train(run: RunConfig, desk: Desk) -> None:
    """Do what is left of a run, from the newest checkpoint to the exported files, which end up on the board.

    Raises `Yielded` when it was told to stop and did, otherwise errors of `diffusion_trainer.errors`.
    """
    spec, settings, board, stop = run.spec, desk.settings, desk.board, desk.stop
    with gpu_errors(), ExitStack() as stack:
        with stop.cut_short():
            stores = open_stores(run, credentials=settings.credentials)
            ledger, target = open_checkpoints(run, stores, on_warning=board.warn)  # older attempts are fenced off now
            delivered = output.receipt(stores.state, stores.output, identity=spec.identity())
            if delivered is not None:
                LOG.info("an earlier attempt exported everything")
                board.update(output=delivered)
                return
            publisher = stack.enter_context(Publisher(target, staging=settings.work / "staging", on_warning=board.warn))
            ready = prepare(run, stores, work=settings.work, board=board)
            step, curves = resume(run, ledger, ready, desk=desk)
        total = ready.extent.total_steps
        batches = stack.enter_context(open_batches(spec, ready, start_step=step, workers=settings.loader_workers))
        courier = stack.enter_context(Courier(stores.output, on_warning=board.warn))
        events = settings.work / "tensorboard" if spec.tracking.tensorboard else None
        tracking = Tracking(curves, courier, folder=events, attempt=run.attempt, start_step=step)
        reporter = Reporter(board, desk.metrics, extent=ready.extent, start_step=step)
        saver = Saver(
            publisher,
            partial(snapshot, trained=ready.trained, curves=curves, basis=ready.basis),
            cadence=Cadence.parse(spec.checkpoint.interval),
            start_step=step,
            voices=Voices(board, desk.metrics, stores.state.uri),
        )
        evaluator = Evaluator(
            spec=spec,
            lock=ready.plan.lock,
            cache=ready.cache,
            family=ready.family,
            errors=ready.errors,
            batch_size=ready.share.micro_batch_size,
            total_steps=total,
            curves=curves,
            courier=courier,
            stop=stop,
            report=board.say,
        )

        evaluator.evaluate_when_due(step)  # the last attempt may have been stopped before it could
        while step < total and not stop.requested:
            wait_seconds, batch = timed(batches)
            loss = gradients(batch, ready)
            learning_rate = optim.lr_at(step, spec.training.lr_schedule, peak=spec.learning_rate, total_steps=total)
            norm = optim.apply_update(
                ready.trained.optimizer,
                learning_rate=learning_rate,
                max_grad_norm=spec.training.optimizer.max_grad_norm,
            )
            step += 1
            curves.note(step, loss=loss, learning_rate=learning_rate, grad_norm=norm)
            settings.failpoint.hit("step", step)
            reporter.stepped(step, wait_seconds=wait_seconds, now=time.time())

            evaluator.evaluate_when_due(step)
            saving = saver.due(step)
            if saving or reporter.due(step):
                settle(curves, ready.plan, metrics=desk.metrics)  # the only wait for the device: losses as numbers
                reporter.report(step, curves)
            if saving:
                saver.save(step)
                tracking.publish()
                settings.failpoint.hit("checkpoint", step)
            saver.announce()

        settle(curves, ready.plan, metrics=desk.metrics)
        if stop.requested:
            saver.give_way(step, seconds_left=stop.seconds_left)
            raise Yielded
        saver.save(step, wait=True)
        tracking.publish()
        with stop.cut_short():
            board.update(stage="Exporting", detail="")
            board.update(output=deliver(spec, stores, ready, folder=settings.work / "export"))


def open_checkpoints(run: RunConfig, stores: Stores, *, on_warning: Callable[[str], None]) -> tuple[Ledger, Target]:
    """Take the fence; return the ledger to resume from and the target of new checkpoints. Raises `Fenced`."""
    identity = run.spec.identity()
    retention = Retention(keep_last=run.spec.checkpoint.keep_last)
    ledger = Ledger(
        stores.state, attempt=run.attempt, run_spec_sha=identity, retention=retention, on_warning=on_warning
    )
    return ledger, Target(stores.open_state, ledger.acquire().lease, identity, retention)


def resume(run: RunConfig, ledger: Ledger, ready: Ready, *, desk: Desk) -> tuple[int, Curves]:
    """Put back the newest checkpoint, if the job wants that; return its step and curves, or those of a fresh start."""
    if run.spec.checkpoint.resume == "Never":
        ledger.start_over()
    with desk.metrics.checkpoint_duration.labels("load").time():
        found = ledger.load(scratch=desk.settings.work)
    curves = restore(found, ready.trained, basis=ready.basis) if found else Curves()
    step = found.step if found else 0
    desk.board.update(stage="Running", detail="", step=step, resumed_from_step=step if found else None)
    total, micro_batch = ready.extent.total_steps, ready.share.micro_batch_size
    LOG.info("from step %d to %d, micro-batch %d on %s", step, total, micro_batch, ready.device.torch)
    return step, curves


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
        objective=spec.training.objective,
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
        weights = ready.objective.weights[batch.timesteps] * batch.weights
        loss = (weights * ready.errors(batch)).sum() / ready.extent.batch_size
        ready.device.accelerator.backward(loss)
        total += loss.detach()
    return total


def settle(curves: Curves, plan: Plan, *, metrics: Metrics) -> None:
    """Read the losses from the device. Raises `Diverged`, before anything that came of it can be saved."""
    fresh = curves.settle()
    metrics.nonfinite_loss.inc(sum(not math.isfinite(point.loss) for point in fresh))
    if bad := first_diverged(fresh):
        images = [plan.lock.images[slot.image].key for slot in plan.batch(bad.step - 1)]
        raise Diverged(
            f"the loss of step {bad.step} is {bad.loss}: lower training.learningRate (it was {bad.learning_rate:.3g}) "
            f"or raise lrSchedule.warmupSteps; the images of this step were {', '.join(images[:8])}"
        )


def deliver(spec: TrainerSpec, stores: Stores, ready: Ready, *, folder: Path) -> tuple[OutputFile, ...]:
    """Export the weights in every format, upload them, and leave the receipt."""
    paths = []
    for name in spec.output.formats:
        prefix, write = EXPORTERS[name]
        (folder / prefix).mkdir(parents=True, exist_ok=True)
        paths += write(ready.trained.weights(), ready.family, spec, folder=folder / prefix)
    card = folder / output.CARD
    card.write_text(
        output.model_card(
            spec,
            family=ready.family.name,
            images=len(ready.plan.lock.training),
            steps=ready.extent.total_steps,
        )
    )
    files = output.upload(stores.output, folder, [*paths, card])
    output.sign(stores.state, files, identity=spec.identity())
    return files
