"""How a step is made to fit into the memory of a GPU: attention, recomputed activations, and micro-batches by trial."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffusion_api.job import TrainerSpec
from diffusion_api.memory import GIB, architecture_of, estimate
from diffusion_trainer.errors import BadConfig

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
"""Of queries and keys in an attention of diffusers; SD3.5 has them."""


def set_attention(denoiser: Any, asked: str, *, device: torch.device) -> None:
    """Make the denoiser use the attention that the job asks for; Auto is torch's own (SDPA), as diffusers has it.

    Raises:
        BadConfig: xFormers needs a GPU, or is not installed.

    """
    if asked != "XFormers":
        return
    if device.type != "cuda":
        raise BadConfig("training.attention is XFormers, whose kernels are for CUDA, and this run has no GPU; use SDPA")
    if importlib.util.find_spec("xformers") is None:
        raise BadConfig(
            "training.attention is XFormers, which this trainer lacks; use SDPA, which is as fast, or an image with "
            "diffusion-operator[trainer,cuda]"
        )
    denoiser.enable_xformers_memory_efficient_attention()
    for module in denoiser.modules():
        for norm in (getattr(module, name, None) for name in _NORMS):
            if norm is not None:
                norm.register_forward_hook(_in_the_precision_of_its_input)


def _in_the_precision_of_its_input(_: nn.Module, given: tuple[torch.Tensor, ...], normed: torch.Tensor) -> torch.Tensor:
    """Return what a norm with fp32 weights made of bf16 in bf16 again: xFormers refuses to mix it with bf16 values.

    Torch's attention is on autocast's list, and needs no such thing.
    """
    return normed.to(given[0].dtype)


def recomputes(spec: TrainerSpec, config: Mapping[str, Any], *, micro_batch: int, memory_gib: float | None) -> bool:
    """Return whether activations are computed again in the backward pass instead of being kept.

    Auto does it where an estimate says that the step would not fit otherwise. `config` is the denoiser's, `memory_gib`
    the GPU's memory; None without a GPU. Networks that are not known fit, as far as can be told.
    """
    asked = spec.training.gradient_checkpointing
    architecture = architecture_of(config)
    if asked != "Auto" or architecture is None or memory_gib is None:
        return asked == "Always"
    need = estimate(spec, family=architecture, micro_batch=micro_batch, checkpointing=False)
    return need.moments["Training"] > memory_gib


def set_recomputing(modules: Iterable[nn.Module], *, on: bool) -> None:
    """Make networks of diffusers and transformers keep their activations, or compute them again.

    They do so in training mode only.
    """
    for module in modules:
        network: Any = module
        if hasattr(network, "enable_gradient_checkpointing"):  # diffusers
            (network.enable_gradient_checkpointing if on else network.disable_gradient_checkpointing)()
            continue
        # transformers has a new name for it, and warns of the old one.
        kind = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
        if on:
            getattr(network, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(network, f"{kind}_checkpointing_disable")()


def is_limited(device: torch.device) -> bool:
    """Return whether a device runs out of memory with an error that can be caught; hosts just kill."""
    return device.type == "cuda"


def memory_of(device: torch.device) -> float | None:
    """Return the GiB of a GPU; None of anything else."""
    if not is_limited(device):
        return None
    return float(torch.cuda.get_device_properties(device).total_memory) / GIB


def divisor(share: int, most: int) -> int:
    """Return the largest divisor of a process's share of the batch up to a bound; 0 where the bound is below 1."""
    return next((size for size in range(min(share, most), 0, -1) if share % size == 0), 0)


def largest_that_fits(share: int, start: int, fits: Callable[[int], bool]) -> int:
    """Return the first micro-batch that fits, from `start` down, each at most half of the one before; 0 if none does.

    All are divisors of the share, so that every forward pass has one shape.
    """
    size = divisor(share, start)
    while size and not fits(size):
        size = divisor(share, size // 2)
    return size


def fits(compute: Callable[[], object]) -> bool:
    """Return whether a computation gets the memory that it asks for; nothing of it is kept."""
    try:
        compute()
    except torch.OutOfMemoryError:
        found = False
    else:
        found = True
    if not found:
        release()  # here, where the exception is gone, and with it the frames that hold tensors
    return found


def release() -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    torch.cuda.empty_cache()
