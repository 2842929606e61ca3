"""The device of a run: where to compute, in which precision, how deterministically, and in pieces of what size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from diffusion_api.run import RunConfig
from diffusion_trainer.errors import BadConfig, GpuFault, GpuOutOfMemory
from diffusion_trainer.fitting import divisor, is_shortage

_DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}
_CUDA_FAULTS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS", "NVML")


@dataclass(frozen=True)
class Device:
    """Accelerate's handle and the dtype of the forward pass; frozen weights are kept in it, trained ones in fp32.

    Of Accelerate no scaler of losses is used: its state could not be a part of our checkpoints (`optim.LossScale`).
    """

    accelerator: Accelerator
    dtype: torch.dtype

    @property
    def torch(self) -> torch.device:
        """Return torch's name for it."""
        return self.accelerator.device

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which the forward pass is computed in `dtype`."""
        mixed = self.dtype != torch.float32
        context: AbstractContextManager[None] = torch.autocast(
            self.torch.type, dtype=self.dtype if mixed else torch.bfloat16, enabled=mixed
        )
        return context


def open_device(run: RunConfig) -> Device:
    """Return the device that the run asks for; a missing GPU is never replaced by the CPU.

    Raises:
        GpuFault: there is no working GPU.
        BadConfig: the GPU cannot compute in the precision that was asked for.

    """
    on_gpu = run.device == "CUDA"
    if on_gpu:
        _check_gpu()
    _choose_algorithms(deterministic=run.spec.training.deterministic)
    dtype = _precision(run.spec.training.mixed_precision, on_gpu=on_gpu)
    return Device(Accelerator(cpu=not on_gpu, mixed_precision="no"), dtype)


def micro_batch_size(run: RunConfig) -> int:
    """Return the images per process and forward pass: the largest divisor of a process's share within all bounds.

    Bounds: `training.microBatchSize` (Auto sets none), and what earlier attempts found to fit.
    """
    batch, world = run.spec.batch_size, run.world_size
    if batch % world:
        raise BadConfig(
            f"training.batchSize is {batch}, which {world} GPUs cannot share evenly; use a multiple of {world}"
        )
    share = batch // world
    asked = run.spec.training.micro_batch_size
    return divisor(share, min(run.micro_batch_size or share, share if asked == "Auto" else asked))


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Raise what CUDA and its libraries report as `GpuOutOfMemory` and `GpuFault`."""
    try:
        yield
    except RuntimeError as error:
        if is_shortage(error):
            raise GpuOutOfMemory(
                f"the micro-batch does not fit into the GPU's memory ({_first_line(error)}); the job is tried again "
                "with half of it"
            ) from error
        if not any(mark in str(error) for mark in _CUDA_FAULTS):
            raise
        raise GpuFault(f"the GPU failed: {_first_line(error)}; look at the node's GPU if it lasts") from error


def _check_gpu() -> None:
    try:
        working = torch.cuda.is_available() and torch.ones(1, device="cuda").item() == 1
    except RuntimeError as error:
        raise GpuFault(f"the GPU does not work: {_first_line(error)}; look at the node's GPU if it lasts") from error
    if not working:
        raise GpuFault(
            "the job asks for a GPU and CUDA finds none: check that the profile's resource name is that of the node's "
            "GPUs, and the node's driver"
        )


def _choose_algorithms(*, deterministic: bool) -> None:
    """Choose CUDA's algorithms; on the CPU there is nothing to choose."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # shapes are static within a bucket, so searching pays
    if deterministic:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds up in any order


def _precision(asked: str, *, on_gpu: bool) -> torch.dtype:
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "BF16" and not has_bf16:
        raise BadConfig(
            f"training.mixedPrecision is BF16, which {torch.cuda.get_device_name()} cannot compute in; use FP16 or FP32"
        )
    auto = "BF16" if on_gpu and has_bf16 else "FP32"
    return _DTYPES[auto if asked == "Auto" else asked]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
