"""Everything before the first step: dataset, model, cache, adapters, plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_api.run import RunConfig
from diffusion_trainer import cache, data, fitting, methods, models
from diffusion_trainer.class_images import with_class_images
from diffusion_trainer.data import Batch, DatasetLock, Plan, Share
from diffusion_trainer.device import Device, micro_batch_size, open_device
from diffusion_trainer.errors import BadConfig, NotFound, PreconditionFailed
from diffusion_trainer.methods import Attached, TextPath
from diffusion_trainer.models import Family
from diffusion_trainer.objective import Objective, objective_of
from diffusion_trainer.peers import Peers
from diffusion_trainer.progress import Board
from diffusion_trainer.reporting import Extent
from diffusion_trainer.scoring.scorer import Scorer, open_scorer
from diffusion_trainer.state import Basis, Trained, made_trainable
from diffusion_trainer.stores import Stores

LOG = logging.getLogger(__name__)
QUIET_SECONDS = 5.0
LOCK_KEY = "dataset.lock.json"


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
    attached: Attached
    trained: Trained
    basis: Basis
    scorer: Scorer | None = None

    def errors(self, batch: Batch) -> Tensor:
        """Return the mean squared error of each image of a micro-batch on the device, fp32 [B]."""
        if self.attached.masks and batch.slots:  # there are none in an evaluation, which drops nothing
            slots = [(slot.step, slot.slot) for slot in batch.slots]
            self.attached.masks.draw(self.plan.seed, slots, device=self.device.torch)
        noisy = self.objective.noisy(batch.latents, batch.noise, times=batch.times)
        with self.device.autocast():
            conditioning = self.attached.text.conditioning(batch.conditioning)
            predicted = self.family.predict(noisy, batch.times, conditioning, batch.geometry)
        return self.objective.errors(predicted, batch.latents, batch.noise, times=batch.times)


def prepare(run: RunConfig, stores: Stores, *, work: Path, board: Board, peers: Peers) -> Ready:
    """Freeze or fetch the dataset, load the model, make trainable what the method trains, encode what is not cached.

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
    methods.check_captions(spec, (lock.images[image].caption for image in lock.training))
    with peers.node_leader_first("model"):
        folder = models.fetch_model(stores.model, work, report=report)
        methods.supply_denoiser(folder, spec, seed=seed)
    report("loading the model")
    family = models.open_model(folder, spec, device=device.torch, dtype=device.dtype)
    check_sizes(lock, family)
    pictures = data.Pictures((*stores.datasets, stores.state), work)
    with peers.node_leader_first("scores"):
        scorer = open_scorer(spec, lock, pictures, source=stores.scores, device=device.torch, report=report)
    lock = with_class_images(lock, family, spec, state=stores.state, pictures=pictures, peers=peers, report=report)
    attached = methods.attach(family, spec, seed=seed)
    for warning in cut_off(spec, lock, attached.text):
        board.warn(warning)
    variants = spec.dataset.augmentation.variants_per_image
    captions = data.CaptionVariants(spec.dataset.captions, variants=variants, seed=seed)
    build = partial(
        cache.build,
        lock,
        family,
        stores.output,
        variants=data.Variants(spec.dataset.augmentation, seed=seed),
        captions=captions,
        pictures=pictures,
        report=report,
        text=attached.text,
    )
    if peers.world_size > 1:
        build(part=peers.part)
        peers.meet("cache")
    with peers.node_leader_first("shards"):
        cached = build()
    family.release_encoders()
    trained = made_trainable(attached.groups, spec.training, device=device)
    trained.optimizer.register_step_post_hook(lambda *_: attached.after_update())
    attached.train()
    plan = plan_of(spec, lock, captions=captions)
    extent = Extent(spec.total_steps(plan.batches_per_epoch), plan.batches_per_epoch, spec.batch_size)
    objective = objective_of(family.process, spec.training.objective).to(device.torch)
    basis = Basis(lock.sha, family.file_hashes())
    ready = Ready(device, family, cached, plan, extent, share, objective, attached, trained, basis, scorer)
    economise(spec, ready)
    return ready


def plan_of(spec: TrainerSpec, lock: DatasetLock, *, captions: data.CaptionVariants) -> Plan:
    """Return which images make up which step. Class images are a concept of their own, behind the job's."""
    dataset = spec.dataset
    return Plan(
        lock,
        batch_size=spec.batch_size,
        seed=spec.training.seed,
        variants=dataset.augmentation.variants_per_image,
        caption_dropout=(*dataset.caption_dropouts, dataset.captions.dropout),
        captions=captions,
        prior_loss_weight=spec.dream_booth.prior_loss_weight if spec.dream_booth else 0,
    )


def economise(spec: TrainerSpec, ready: Ready) -> None:
    """Choose attention and what is computed twice, as the job says or as it fits. Raises `BadConfig`."""
    denoiser: Any = ready.family.denoiser  # torch's type knows nothing of configurations
    device = ready.device.torch
    fitting.set_attention(denoiser, spec.training.attention, device=device)
    least = ready.share.micro_batch_size if spec.training.micro_batch_size != "Auto" else 1
    if fitting.recomputes(spec, denoiser.config, micro_batch=least, memory_gib=fitting.memory_of(device)):
        fitting.set_recomputing(ready.attached.modules, on=True)


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


def cut_off(spec: TrainerSpec, lock: DatasetLock, text: TextPath) -> Iterator[str]:
    """Yield a warning where captions, or prompts of samples, are longer than the model reads."""
    captions = sorted({image.caption for image in lock.images})
    prompts = [text for one in spec.validation.prompts for text in (one.prompt, one.negative_prompt)]
    for what, texts in (("captions", captions), ("validation.prompts", prompts)):
        if found := text.cut_off(texts):
            yield (
                f"{len(found)} of {len(texts)} {what} are longer than the model reads, and their ends are lost on it, "
                f"e.g. that of {found[0][:60]!r}...; put what matters first, or shorten them"
            )


def check_split(spec: TrainerSpec, lock: DatasetLock) -> None:
    """Refuse early stopping where nothing is held out that it could go by. Raises `BadConfig`."""
    if spec.validation.early_stopping and not lock.held_out:
        raise BadConfig(
            f"validation.earlyStopping goes by held-out images, but of {len(lock.images)} images none can be spared: "
            "add images, or leave earlyStopping out"
        )


def check_sizes(lock: DatasetLock, family: Family) -> None:
    """Refuse shapes that the model cannot take. Raises `BadConfig`."""
    multiple = family.size_multiple
    for width, height in sorted({image.bucket for image in lock.images}):
        if width % multiple or height % multiple:
            raise BadConfig(
                f"dataset.resolution and dataset.buckets.step make images of {width} x {height}, but this "
                f"{family.name} takes multiples of {multiple} only; use such a resolution and step"
            )
    network: Any = family.denoiser
    places = network.config.get("pos_embed_max_size")
    longest = max((max(image.bucket) for image in lock.images), default=0)
    if places and longest > places * multiple:
        raise BadConfig(
            f"dataset.resolution and dataset.buckets make images of {longest} px, but this {family.name} knows places "
            f"of {places * multiple} px at most; use a lower resolution, or a lower dataset.filters.maxAspectRatio"
        )


def open_dataset(spec: TrainerSpec, stores: Stores, *, work: Path, report: Callable[[str], None]) -> DatasetLock:
    """Return the dataset as the first attempt froze it; this one freezes it when it is the first."""
    try:
        return DatasetLock.from_json(stores.state.get(LOCK_KEY))
    except NotFound:
        report("reading the dataset")
    lock = data.freeze(
        spec.dataset,
        data.folders_of(spec, stores.datasets),
        seed=spec.training.seed,
        batch_size=spec.batch_size,
        work=work,
        report=report,
    )
    check_split(spec, lock)  # not of an older lock: a run that began goes on
    try:
        stores.state.put(LOCK_KEY, lock.to_json(), if_absent=True)
    except PreconditionFailed:  # another start was first; what it froze is what counts
        return DatasetLock.from_json(stores.state.get(LOCK_KEY))
    return lock
