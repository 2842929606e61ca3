"""Everything before the first step: dataset, model, cache, adapters, plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_api import names
from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_api.run import RunConfig
from diffusion_trainer import cache, data, export, models, optim
from diffusion_trainer.data import Batch, DatasetLock, Plan, Share
from diffusion_trainer.device import Device, micro_batch_size, open_device
from diffusion_trainer.errors import NotFound, PreconditionFailed
from diffusion_trainer.models import Family
from diffusion_trainer.objective import Objective, objective_of
from diffusion_trainer.peers import Peers
from diffusion_trainer.progress import Board
from diffusion_trainer.reporting import Extent
from diffusion_trainer.state import Basis, Trained
from diffusion_trainer.stores import Stores

LOG = logging.getLogger(__name__)
QUIET_SECONDS = 5.0
LOCK_KEY = "dataset.lock.json"
EXPORTERS = {
    "Diffusers": (names.EXPORT_DIFFUSERS, export.export_diffusers),
    "Kohya": (names.EXPORT_KOHYA, export.export_kohya),
    "SingleFile": (names.EXPORT_SINGLE_FILE, export.export_single_file),
}


@dataclass(frozen=True)
class Ready:
    """Everything that stands before the first step."""

    device: Device
    family: Family
    cache: cache.Cache
    plan: Plan
    extent: Extent
    share: Share
    objective: Objective
    trained: Trained
    basis: Basis

    def errors(self, batch: Batch) -> Tensor:
        """Return the mean squared error of each image of a micro-batch on the device, fp32 [B]."""
        noisy = self.objective.noisy(batch.latents, batch.noise, times=batch.times)
        with self.device.accelerator.autocast():
            predicted = self.family.predict(noisy, batch.times, batch.conditioning, batch.geometry)
        return self.objective.errors(predicted, batch.latents, batch.noise, times=batch.times)


def prepare(run: RunConfig, stores: Stores, *, work: Path, board: Board, peers: Peers) -> Ready:
    """Freeze or fetch the dataset, load the model, encode what is not cached, and put adapters on the denoiser.

    Of several processes the leader freezes, all encode, and one on each node downloads.
    """
    spec, seed = run.spec, run.spec.training.seed
    report = narrator(board)
    share = Share(micro_batch_size(run), peers.rank, peers.world_size)
    device = open_device(run)
    with peers.leader_first("dataset"):
        lock = open_dataset(spec, stores, work=work, report=report)
    for reason, count in lock.rejected_counts.items():
        board.warn(f"{count} images are left out: {reason}, e.g. {', '.join(lock.rejected[reason][:3])}")
    with peers.node_leader_first("model"):
        folder = models.fetch_model(stores.model, work, report=report)
    report("loading the model")
    family = models.open_model(folder, spec, device=device.torch, dtype=device.dtype)
    build = partial(
        cache.build,
        lock,
        family,
        stores.output,
        variants=data.Variants(spec.dataset.augmentation, seed=seed),
        pictures=data.Pictures(stores.dataset, work),
        report=report,
    )
    if peers.world_size > 1:
        build(part=peers.part)
        peers.meet("cache")
    with peers.node_leader_first("shards"):
        cached = build()
    family.release_encoders()
    parameters = models.add_lora(family, spec.lora or LoRA(), seed=seed)
    trained = Trained(
        parameters, optim.make_optimizer([optim.Group(parameters)], spec.training.optimizer, device=device.torch)
    )
    denoiser: Any = family.denoiser  # diffusers' models know how to checkpoint their activations; torch's type does not
    if spec.training.gradient_checkpointing == "Always":
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    plan = Plan(
        lock,
        batch_size=spec.batch_size,
        seed=seed,
        variants=spec.dataset.augmentation.variants_per_image,
        caption_dropout=spec.dataset.captions.dropout,
    )
    extent = Extent(spec.total_steps(plan.batches_per_epoch), plan.batches_per_epoch, spec.batch_size)
    objective = objective_of(family.process, spec.training.objective).to(device.torch)
    return Ready(device, family, cached, plan, extent, share, objective, trained, Basis(lock.sha, family.file_hashes()))


def narrator(board: Board, *, monotonic: Callable[[], float] = time.monotonic) -> Callable[[str], None]:
    """Return what puts a line on the board and, at most every few seconds, into the log."""
    quiet_until = 0.0

    def report(detail: str) -> None:
        nonlocal quiet_until
        board.say(detail)
        if monotonic() >= quiet_until:
            quiet_until = monotonic() + QUIET_SECONDS
            LOG.info(detail)

    return report


def open_dataset(spec: TrainerSpec, stores: Stores, *, work: Path, report: Callable[[str], None]) -> DatasetLock:
    """Return the dataset as the first attempt froze it; this one freezes it when it is the first."""
    try:
        return DatasetLock.from_json(stores.state.get(LOCK_KEY))
    except NotFound:
        report("reading the dataset")
    lock = data.freeze(
        spec.dataset, stores.dataset, seed=spec.training.seed, batch_size=spec.batch_size, work=work, report=report
    )
    try:
        stores.state.put(LOCK_KEY, lock.to_json(), if_absent=True)
    except PreconditionFailed:  # another start was first; what it froze is what counts
        return DatasetLock.from_json(stores.state.get(LOCK_KEY))
    return lock
