"""How a step is made to fit into the memory of a GPU: attention, recomputed activations, and micro-batches by trial."""

from __future__ import annotations

import gc
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from diffusion_api.job import TrainerSpec
from diffusion_api.memory import GIB, architecture_of, estimate
from diffusion_trainer.errors import BadConfig

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
"""Of queries and keys in an attention of diffusers; SD3.5 has them."""
_SHORTAGE = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|Cuda failure (?:\d+ )?'out of memory'"  # torch, the driver, NCCL
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_(?:ALLOC|INTERNAL_ERROR_DEVICE_ALLOCATION)_FAILED"
)
_PERHAPS_SHORTAGE = re.compile(r"CUBLAS_STATUS_NOT_INITIALIZED|unable to find an engine to execute this computation")
"""What cuBLAS says where its handle finds no room, and cuDNN where no workspace does; broken GPUs say so, too."""
_FULL_BYTES = 256 * 2**20
"""With less than that left there may be no room for a library's handle."""
PART_BYTES = 256 * 2**20
"""What is computed of all weights at once takes no more memory beside them: little beside a step's activations."""

OneTensor = TypeVar("OneTensor", bound=torch.Tensor)


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
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        found = False
    else:
        found = True
    if not found:
        release()  # here, where the exception is gone, and with it the frames that hold tensors
    return found


def in_parts(tensors: Iterable[OneTensor]) -> list[list[OneTensor]]:
    """Return tensors in their order, in parts of at most `PART_BYTES`; a larger one is a part of its own."""
    parts: list[list[OneTensor]] = []
    left = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not parts or size > left:
            parts.append([])
            left = PART_BYTES
        parts[-1].append(tensor)
        left -= size
    return parts


def is_shortage(error: BaseException) -> bool:
    """Return whether an error means that the device's memory was too short, whichever library found that out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return bool(_SHORTAGE.search(text)) or (bool(_PERHAPS_SHORTAGE.search(text)) and _gpu_is_full())


def release() -> None:
    """Give back what nobody uses any more, after memory was short."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.is_initialized():
        torch.cuda.reset_accumulated_memory_stats()  # that shortage is dealt with


def _gpu_is_full() -> bool:
    """Return whether allocations have failed since the last `release`, or next to nothing is left."""
    if not torch.cuda.is_available():
        return False
    try:
        free, _ = torch.cuda.mem_get_info()
        return free < _FULL_BYTES or torch.cuda.memory_stats()["num_ooms"] > 0
    except RuntimeError:  # a GPU that cannot even say that has another fault
        return False
