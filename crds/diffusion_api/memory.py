"""How much GPU memory a job needs: an estimate from counted parameters and measured activations, before any GPU.

Component model: weights, gradients, optimizer state and averages follow from the number of parameters
(`memory_table.NETWORKS`, counted on the real classes), activations from a line in micro-batch and image area
(`memory_table.ACTIVATIONS`, measured by bench/trainer/activations.py), and what no count shows from a reserve. A job's
peak is the largest of three moments: a training step, the encoding of images and captions before it, and sample
pictures. docs/reference/memory.md compares it with published measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusion_api.job import TrainerSpec
from diffusion_api.memory_table import ACTIVATIONS, NETWORKS, Architecture, Line, Network, Trained

GIB = 1024**3
CONTEXT_GIB = 0.6
"""CUDA's context and the kernels that are loaded into it: 0.4 to 0.8 GiB from Ampere to Hopper."""
WORKSPACE_GIB = 0.3
"""Workspaces of cuBLAS and cuDNN."""
FRAGMENTATION = 0.05
"""Share of the rest that the caching allocator holds without using it."""
MARGIN = 0.9
"""A job is refused only when this share of the estimate does not fit: the estimate errs by about so much."""
PIXELS_ENCODED_AT_A_TIME = 8 * 512 * 512
"""As the trainer does it: eight images of 512 px, two of 1024."""
RESOLUTIONS = (256, 384, 512, 640, 768, 1024)
"""Lower resolutions that a remedy may name."""

STATE_BYTES = {"AdamW": 8.0, "AdamW8bit": 2.1, "Adafactor": 0.1, "Prodigy": 16.0, "Lion": 4.0}
"""Optimizer state per trained parameter: AdamW two moments in fp32, 8-bit two bytes and their scales, Adafactor rows
and columns, Prodigy two moments, its sums and the initial weights, Lion one moment."""

SMALLEST: dict[str, Architecture] = {"SD1": "SD1", "SD2": "SD2", "SDXL": "SDXL", "SD3": "SD3-medium"}
"""The smallest published network of a family; an unconditional UNet may be of any size."""

_OF_TEXT: dict[Architecture, Architecture] = {"SD3.5-medium": "SD3-medium", "SD3.5-large": "SD3-medium"}
"""Whose text encoders were measured in place of the same ones."""

Peak = Literal["Training", "Preparation", "Sampling"]


@dataclass(frozen=True)
class MemoryEstimate:
    """`parts` in GiB are those of the moment with the highest need, and add up to `total_gib`."""

    total_gib: float
    peak: Peak
    parts: Mapping[str, float]
    moments: Mapping[Peak, float]
    """What each moment needs, in GiB."""

    def __str__(self) -> str:
        """Return the total and its parts."""
        shown = ", ".join(f"{name} {gib:.1f}" for name, gib in self.parts.items() if gib >= 0.05)
        return f"{self.total_gib:.1f} GiB while {_DOING[self.peak]} ({shown})"


_DOING = {"Training": "training", "Preparation": "encoding images and captions", "Sampling": "drawing samples"}


def estimate(
    spec: TrainerSpec, *, family: Architecture, micro_batch: int, checkpointing: bool | None = None
) -> MemoryEstimate:
    """Return what one GPU needs at its peak.

    `checkpointing` None is what the spec says; Auto counts as off.
    """
    network, trained = NETWORKS[family], _trained(spec)
    low = spec.training.mixed_precision != "FP32"
    recomputed = spec.training.gradient_checkpointing == "Always" if checkpointing is None else checkpointing
    line = ACTIVATIONS[_case(family, trained, low=low, recomputed=recomputed)]
    resident = _resident(spec, network, trained=trained)
    moments: dict[Peak, dict[str, float]] = {
        "Training": resident | {"activations": _at(line, micro_batch, network.latents(spec.dataset.resolution))}
    }
    if text := _text_in_loop(spec, family, micro_batch=micro_batch, recomputed=recomputed):
        moments["Training"] |= text
    if network.vae:
        moments["Preparation"] = _preparation(spec, network)
        if spec.validation.draws:
            learning = {"text encoders": _learning_text(spec, network)}
            moments["Sampling"] = resident | learning | _sampling(spec, network)
    reserved = {peak: _with_reserve(parts) for peak, parts in moments.items()}
    peak = max(reserved, key=lambda moment: sum(reserved[moment].values()))
    totals = {moment: sum(parts.values()) / GIB for moment, parts in reserved.items()}
    parts = {name: value / GIB for name, value in reserved[peak].items()}
    return MemoryEstimate(total_gib=totals[peak], peak=peak, parts=parts, moments=totals)


def largest_micro_batch(
    spec: TrainerSpec, family: Architecture, memory_gib: float, *, checkpointing: bool | None = None
) -> int:
    """Return the most images per forward pass that fit, at most the batch; 0 where not even one does."""

    def fits(images: int) -> bool:
        need = estimate(spec, family=family, micro_batch=images, checkpointing=checkpointing)
        return need.total_gib <= memory_gib

    low, high = 0, spec.batch_size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def too_large(spec: TrainerSpec, *, family: Architecture, memory_gib: float) -> str | None:
    """Return why a job cannot run in that memory and what would help; None where it may, at micro-batch 1."""
    checkpointing = spec.training.gradient_checkpointing != "Never"
    need = estimate(spec, family=family, micro_batch=1, checkpointing=checkpointing)
    if need.total_gib * MARGIN <= memory_gib:
        return None
    how = "with gradient checkpointing" if checkpointing else "without gradient checkpointing"
    remedies = [*_remedies(spec, family, memory_gib), f"use a profile with {need.total_gib:.0f} GiB or more per GPU"]
    return (
        f"{spec.method} of {family} at {spec.dataset.resolution} px needs about {need} at micro-batch 1 {how}, but a "
        f"GPU of the profile has {memory_gib:g} GiB: {', or '.join(remedies)}"
    )


def _remedies(spec: TrainerSpec, family: Architecture, memory_gib: float) -> Iterator[str]:
    """Yield single changes to the job that make it fit."""

    def fits(changed: TrainerSpec, *, checkpointing: bool) -> bool:
        need = estimate(changed, family=family, micro_batch=1, checkpointing=checkpointing)
        return need.total_gib <= memory_gib

    checkpointing = spec.training.gradient_checkpointing != "Never"
    if not checkpointing and fits(spec, checkpointing=True):
        yield "set training.gradientCheckpointing: Always"
    lower = [side for side in RESOLUTIONS if side < spec.dataset.resolution]
    fitting = [side for side in lower if fits(_changed(spec, "dataset", resolution=side), checkpointing=checkpointing)]
    if fitting:
        yield f"set dataset.resolution: {fitting[-1]}"
    if spec.training.mixed_precision == "FP32" and fits(
        _changed(spec, "training", mixed_precision="BF16"), checkpointing=checkpointing
    ):
        yield "set training.mixedPrecision: BF16"
    if _trained(spec) == "Denoiser":
        for name in ("AdamW8bit", "Adafactor"):
            optimizer = spec.training.optimizer.model_copy(update={"name": name})
            if fits(_changed(spec, "training", optimizer=optimizer), checkpointing=checkpointing):
                yield f"set training.optimizer.name: {name}"
                break
        if spec.method == "FineTune":
            yield "use method: LoRA"


def _changed(spec: TrainerSpec, section: str, **changes: Any) -> TrainerSpec:
    return spec.model_copy(update={section: getattr(spec, section).model_copy(update=changes)})


def _trained(spec: TrainerSpec) -> Trained:
    # For an inversion, gradients pass through the frozen denoiser as they do to adapters.
    return "Denoiser" if spec.trains == "Weights" else "Adapter"


def _trained_parameters(spec: TrainerSpec, network: Network, trained: Trained) -> float:
    """Return how many parameters of the denoiser, or of adapters on it, are trained."""
    if spec.method == "TextualInversion":
        return 0
    if trained == "Adapter":
        targets = spec.lora.targets if spec.lora else "AttentionAndFeedForward"
        rank = spec.lora.rank if spec.lora else 16
        return rank * (network.lora_attention if targets == "Attention" else network.lora_all)
    parts = spec.fine_tune.parts if spec.fine_tune else "All"
    return {"All": network.parameters, "Attention": network.attention, "CrossAttention": network.cross_attention}[parts]


def _resident(spec: TrainerSpec, network: Network, *, trained: Trained) -> dict[str, float]:
    """Return the bytes that stay on the GPU from step to step."""
    count = _trained_parameters(spec, network, trained)
    frozen = network.parameters - (count if trained == "Denoiser" else 0)
    return {
        "weights": (frozen + network.buffers) * _bytes(spec) + 4 * count,
        "gradients": 4 * count,
        "optimizer": STATE_BYTES[spec.training.optimizer.name] * count,
        "average": 4 * count if spec.training.ema.enabled else 0,
    }


def _text_in_loop(spec: TrainerSpec, family: Architecture, *, micro_batch: int, recomputed: bool) -> dict[str, float]:
    """Return what text encoders add to a step where they are in it."""
    if not (spec.model.text_encoder.train or spec.trains == "Embedding"):
        return {}
    network, low = NETWORKS[family], spec.training.mixed_precision != "FP32"
    count = sum(network.clip_encoders)  # T5 has spoken before the first step
    line = ACTIVATIONS[_case(_OF_TEXT.get(family, family), "TextEncoders", low=low, recomputed=recomputed)]
    return {"text encoders": 4 * count + _learning_text(spec, network) + _at(line, micro_batch, 0)}


def _learning_text(spec: TrainerSpec, network: Network) -> float:
    """Return the bytes of gradients, optimizer state and averages of text encoders, beside their weights in fp32.

    Adapters on them and new words are too few to count.
    """
    if spec.trains != "Weights" or not spec.model.text_encoder.train:
        return 0
    learning = 4 + STATE_BYTES[spec.training.optimizer.name] + 4 * spec.training.ema.enabled
    return learning * sum(network.clip_encoders)


def _preparation(spec: TrainerSpec, network: Network) -> dict[str, float]:
    """Return the bytes while the cache is built: the denoiser is there already, encoders are in fp32.

    A denoiser whose weights are trained is in fp32 from the beginning.
    """
    images = max(1, PIXELS_ENCODED_AT_A_TIME // spec.dataset.resolution**2)
    return {
        "weights": (network.parameters + network.buffers) * (4 if spec.trains == "Weights" else _bytes(spec)),
        "encoders": _encoders(spec, network),
        "activations": network.encoding * images * network.latents(spec.dataset.resolution),
    }


def _sampling(spec: TrainerSpec, network: Network) -> dict[str, float]:
    decoding = 4 * network.vae + network.decoding * network.latents(spec.dataset.resolution)
    return {"encoders": max(decoding, _encoders(spec, network) - 4 * network.vae)}


def _encoders(spec: TrainerSpec, network: Network) -> float:
    """Return the bytes of VAE and text encoders; T5 is kept in the precision of the run."""
    clip = sum(network.clip_encoders)
    return 4 * (network.vae + clip) + _bytes(spec) * (sum(network.text_encoders) - clip)


def _bytes(spec: TrainerSpec) -> int:
    """Return the bytes of a frozen parameter."""
    return 4 if spec.training.mixed_precision == "FP32" else 2


def _case(family: Architecture, trained: str, *, low: bool, recomputed: bool) -> str:
    return "/".join((family, trained, "BF16" if low else "FP32", *(["checkpointing"] * recomputed)))


def _at(line: Line, micro_batch: int, latents: float) -> float:
    return line.fixed + micro_batch * (line.per_image + line.per_latent * latents)


def _with_reserve(parts: Mapping[str, float]) -> dict[str, float]:
    reserve = (CONTEXT_GIB + WORKSPACE_GIB) * GIB + FRAGMENTATION * sum(parts.values())
    return {**parts, "reserve": reserve}


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """Return the published network that a denoiser's config.json describes; None where it is none of them."""
    for name, network in NETWORKS.items():
        if all(_plain(config.get(key, default)) == value for key, (value, default) in network.marks.items()):
            return name
    return None


def _plain(value: object) -> object:
    return tuple(_plain(one) for one in value) if isinstance(value, list | tuple) else value
