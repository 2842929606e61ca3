"""From a step of the plan to tensors. Every draw is keyed by (step, slot), so it does not matter who makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from diffusion_trainer.data.plan import Plan, Slot
from diffusion_trainer.objective import Objective
from diffusion_trainer.rng import Purpose, stream


class CachedTensors(Protocol):
    """What the loader asks of a cache; see `diffusion_trainer.cache`. Must be picklable for loader workers."""

    def latents(self, image: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the scaled latents, fp32 [C, h, w] each."""
        ...

    def geometry(self, image: int, variant: int) -> torch.Tensor:
        """Return what SDXL is told of one variant, fp32 [6]."""
        ...

    def text(self, caption: str) -> Mapping[str, torch.Tensor]:
        """Return the conditioning of a caption by the family's names; "" is the null row."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """The part of each batch that one process works on, and in pieces of how many images."""

    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def pieces(self, slots: tuple[Slot, ...]) -> list[tuple[Slot, ...]]:
        """Return this rank's micro-batches: one part of the batch for each rank, in order, cut into pieces.

        The last piece is short when the micro-batch does not divide the part. Raises ValueError when the batch cannot
        be dealt out evenly.
        """
        if len(slots) % self.world_size:
            raise ValueError(
                f"Share: a batch of {len(slots)} cannot be dealt out to {self.world_size} processes evenly; set "
                "training.batchSize to a multiple of the number of GPUs"
            )
        mine = len(slots) // self.world_size
        part = slots[self.rank * mine : (self.rank + 1) * mine]
        return [part[i : i + self.micro_batch_size] for i in range(0, mine, self.micro_batch_size)]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One micro-batch on its way to the denoiser. B images, latents of one shape.

    latents, noise: fp32 [B, C, h, w], latents drawn from the posterior and scaled; times: [B], as the objective draws
    them; conditioning: [B, ...] by the family's names; geometry: fp32 [B, 6]; weights: fp32 [B], of each image's loss.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    conditioning: Mapping[str, torch.Tensor]
    geometry: torch.Tensor
    weights: torch.Tensor
    slots: tuple[Slot, ...] = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Return the batch on a device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the DataLoader calls this by name."""
        return self._mapped(torch.Tensor.pin_memory)

    def cut(self, size: int) -> list[Batch]:
        """Return batches of at most `size` images; views of this one."""
        count = len(self.latents)
        if count <= size:
            return [self]
        parts = [slice(start, start + size) for start in range(0, count, size)]
        return [replace(self._mapped(itemgetter(part)), slots=self.slots[part]) for part in parts]

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            latents=change(self.latents),
            noise=change(self.noise),
            times=change(self.times),
            conditioning={name: change(tensor) for name, tensor in self.conditioning.items()},
            geometry=change(self.geometry),
            weights=change(self.weights),
        )


def stacked(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the conditioning of a batch, from that of each of its images."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def open_loader(  # noqa: PLR0913 - what a batch is made of, and by whom
    plan: Plan,
    cache: CachedTensors,
    *,
    steps: range,
    share: Share,
    objective: Objective,
    noise_offset: float = 0.0,
    workers: int = 0,
) -> Iterator[list[Batch]]:
    """Yield, for each optimizer step of `steps`, this rank's micro-batches.

    The tensors of a step do not depend on where `steps` starts, nor on rank, world size, micro-batch or workers. With
    workers they are made in other processes and, where there is a GPU, arrive in page-locked memory. Closing the
    iterator ends the workers.
    """
    loader: DataLoader[list[Batch]] = DataLoader(
        _Steps(plan, cache, share, objective=objective.to("cpu"), noise_offset=noise_offset),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # else every iterator takes a number from the global one
    )
    yield from loader


class _Steps(Dataset[list[Batch]]):
    """The steps of a plan, as torch's loader wants them."""

    def __init__(
        self, plan: Plan, cache: CachedTensors, share: Share, *, objective: Objective, noise_offset: float
    ) -> None:
        self._plan = plan
        self._cache = cache
        self._share = share
        self._objective = objective
        self._noise_offset = noise_offset

    def __getitem__(self, step: int) -> list[Batch]:
        return [self._batch(piece) for piece in self._share.pieces(self._plan.batch(step))]

    def _batch(self, slots: tuple[Slot, ...]) -> Batch:
        latents = [self._latents(slot) for slot in slots]
        text = [self._cache.text(slot.caption) for slot in slots]
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack([self._noise(slot, like) for slot, like in zip(slots, latents, strict=True)]),
            times=torch.tensor([self._time(slot) for slot in slots], dtype=self._objective.times_dtype),
            conditioning=stacked(text),
            geometry=torch.stack([self._cache.geometry(slot.image, slot.variant) for slot in slots]),
            weights=torch.tensor([slot.weight for slot in slots]),
            slots=slots,
        )

    def _latents(self, slot: Slot) -> torch.Tensor:
        mean, std = self._cache.latents(slot.image, slot.variant)
        return mean + std * _normal(mean, stream(self._plan.seed, Purpose.POSTERIOR, slot.step, slot.slot))

    def _noise(self, slot: Slot, like: torch.Tensor) -> torch.Tensor:
        noise = _normal(like, stream(self._plan.seed, Purpose.NOISE, slot.step, slot.slot))
        if self._noise_offset:
            numbers = stream(self._plan.seed, Purpose.NOISE_OFFSET, slot.step, slot.slot)
            noise += self._noise_offset * _normal(like[:, :1, :1], numbers)
        return noise

    def _time(self, slot: Slot) -> float:
        return self._objective.draw(stream(self._plan.seed, Purpose.TIMESTEP, slot.step, slot.slot))


def _normal(like: torch.Tensor, numbers: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(numbers.standard_normal(tuple(like.shape), dtype=np.float32))
