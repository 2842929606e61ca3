"""Class images of DreamBooth: what the base model draws of the class, so that it does not forget the class.

They lie beside the checkpoints, each is drawn once, and a resumed run trains on the very same files. Which noise an
image begins with is a function of (seed, number), so it does not matter which process draws it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from diffusion_api.job import TrainerSpec
from diffusion_api.validation import SamplePrompt
from diffusion_trainer import sampling
from diffusion_trainer.data import DatasetLock, LockedImage, Pictures
from diffusion_trainer.data.lock import Shape
from diffusion_trainer.errors import BadConfig, NotFound, PreconditionFailed
from diffusion_trainer.models import Family
from diffusion_trainer.objectstore import ObjectStore
from diffusion_trainer.peers import Peers
from diffusion_trainer.rng import Purpose, stream

LOG = logging.getLogger(__name__)
PREFIX = "class-images/"
LOCK_KEY = "class.lock.json"
STEPS, GUIDANCE = 50, 7.5
"""As the pipelines of diffusers have them by default, with which its DreamBooth scripts draw class images."""
_SEEDS = 2**53


@dataclass(frozen=True, slots=True)
class Wanted:
    """One class image: its key below the job's state, its size, and the seed of its noise."""

    key: str
    shape: Shape
    seed: int


def wanted_images(lock: DatasetLock, *, count: int, seed: int) -> tuple[Wanted, ...]:
    """Return the class images of a run, in the shapes of its instance images and as the shares of these are.

    Every shape has one at least, for each batch has one shape. Raises `BadConfig` where there are more shapes than
    images.
    """
    members = Counter(lock.images[i].bucket for i in lock.training)
    if count < len(members):
        raise BadConfig(
            f"dreamBooth.classImages is {count}, but the images have {len(members)} shapes, which need one each; raise "
            "it, or set dataset.buckets.enabled to false"
        )
    shapes = [shape for shape, share in _shares(members, count) for _ in range(share)]
    return tuple(
        Wanted(f"{PREFIX}{number:05d}.png", shape, int(stream(seed, Purpose.CLASS_IMAGE, number).integers(_SEEDS)))
        for number, shape in enumerate(shapes)
    )


def _shares(members: Counter[Shape], count: int) -> Iterator[tuple[Shape, int]]:
    """Deal `count` out: one for each shape, and of the rest, to the nearest whole number from the front, its share."""
    spare, total, so_far, given = count - len(members), members.total(), 0, 0
    for shape, number in sorted(members.items()):
        so_far += number
        upto = (2 * spare * so_far + total) // (2 * total)  # rounded half up
        yield shape, 1 + upto - given
        given = upto


def with_class_images(  # noqa: PLR0913 - what it takes to draw, and whom to tell
    lock: DatasetLock,
    family: Family,
    spec: TrainerSpec,
    *,
    state: ObjectStore,
    pictures: Pictures,
    peers: Peers,
    report: Callable[[str], None],
) -> DatasetLock:
    """Return the lock with the class images that the job asks for; those that are not in `state` yet are drawn.

    `family` is still the base model, and draws by the process that it was published with, whatever the job trains.
    `state` is the last folder of `pictures`. All processes draw a part.

    Raises:
        BadConfig: there are more shapes than class images.

    """
    booth = spec.dream_booth
    if booth is None or not booth.preserves_prior:
        return lock
    # The leader looks, and all do as it says: an older attempt that is not quite dead may freeze at any moment.
    if peers.as_leader_says("class images frozen", bool(peers.leads and _is_there(state, LOCK_KEY))):
        return _joined(lock, DatasetLock.from_json(state.get(LOCK_KEY)))
    report("looking for class images")
    wanted = wanted_images(lock, count=booth.class_images, seed=spec.training.seed)
    prompt = spec.dataset.captions.prefix + (booth.class_prompt or "")
    _draw(wanted[peers.part], family, prompt, state=state, report=report)
    family.release_encoders()
    peers.meet("class images")
    with peers.leader_first("class lock"):
        if peers.leads:
            _freeze(wanted, prompt, state=state, pictures=pictures)
    return _joined(lock, DatasetLock.from_json(state.get(LOCK_KEY)))


def _is_there(state: ObjectStore, key: str) -> bool:
    try:
        state.head(key)
    except NotFound:
        return False
    return True


def _draw(
    wanted: Sequence[Wanted], family: Family, prompt: str, *, state: ObjectStore, report: Callable[[str], None]
) -> None:
    there = {info.key for info in state.list(PREFIX)}
    missing = [one for one in wanted if one.key not in there]
    asked = SamplePrompt(prompt=prompt, guidance_scale=GUIDANCE, steps=STEPS)
    conditioning = sampling.encoded(family, [asked] if missing else [])
    for number, one in enumerate(missing, start=1):
        seeded = [asked.model_copy(update={"seed": one.seed})]
        pictures = sampling.draw(
            family, sampling.wanted(seeded, conditioning), size=one.shape, process=family.published
        )
        picture = sampling.SampleGrid.of(pictures, seeded, process=family.published).picture_png(0)
        with suppress(PreconditionFailed):  # another start of the job was first; what it drew is what counts
            state.put(one.key, picture, if_absent=True)
        report(f"drawing class images {number}/{len(missing)}")
    LOG.info("drew %d class images, %d were there", len(missing), len(wanted) - len(missing))


def _freeze(wanted: Sequence[Wanted], prompt: str, *, state: ObjectStore, pictures: Pictures) -> None:
    """Write down which files the class images are."""
    concept = len(pictures.sources) - 1
    images = tuple(
        LockedImage(
            id=pictures.download(one.key, concept=concept),
            key=one.key,
            width=one.shape[0],
            height=one.shape[1],
            caption=prompt,
            bucket=one.shape,
            split="train",
            concept=concept,
            role="class",
        )
        for one in wanted
    )
    with suppress(PreconditionFailed):
        state.put(LOCK_KEY, DatasetLock(images, {}, {}).to_json(), if_absent=True)


def _joined(lock: DatasetLock, classes: DatasetLock) -> DatasetLock:
    return replace(lock, images=lock.images + classes.images)
