"""The reference of the memory estimate: tables, and how far it is from published measurements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusion_api.job import TrainerSpec
from diffusion_api.memory import (
    CONTEXT_GIB,
    FRAGMENTATION,
    MARGIN,
    WORKSPACE_GIB,
    estimate,
    largest_micro_batch,
)
from diffusion_api.memory_table import NETWORKS, Architecture

CARDS = (24, 40, 80)


@dataclass(frozen=True)
class Anchor:
    """A published measurement: GiB that torch had allocated at most during training."""

    architecture: Architecture
    what: str
    resolution: int
    micro_batch: int
    checkpointing: bool
    gib: float


ANCHORS = (
    Anchor("SD1", "LoRA", 512, 1, checkpointing=False, gib=2.87),
    Anchor("SDXL", "LoKr", 1024, 1, checkpointing=False, gib=13.0),
    Anchor("SDXL", "LoKr", 1024, 1, checkpointing=True, gib=6.5),
    Anchor("SD3-medium", "LoRA", 1024, 3, checkpointing=False, gib=34.6),
    Anchor("SD3-medium", "LoRA", 1024, 3, checkpointing=True, gib=7.7),
)
"""From SimpleTuner's documentation/experimental/SEGMENTED_CHECKPOINTING.md, on an H100, in bf16."""


def spec_of(method: str, resolution: int, **training: object) -> TrainerSpec:
    """Return a run with defaults everywhere else."""
    place = "s3://bucket/folder/"
    return TrainerSpec.model_validate(
        {
            "method": method,
            "model": {"source": place},
            "dataset": {"source": place, "resolution": resolution},
            "output": {"destination": place},
            "training": training,
        }
    )


def trained_gib(anchor: Anchor) -> float:
    """Return the estimate of what torch allocates during training, as the anchors were measured: without reserves."""
    spec = spec_of("LoRA", anchor.resolution)
    need = estimate(
        spec, family=anchor.architecture, micro_batch=anchor.micro_batch, checkpointing=anchor.checkpointing
    )
    return (need.moments["Training"] - CONTEXT_GIB - WORKSPACE_GIB) / (1 + FRAGMENTATION)


def memory() -> str:
    """Return the reference."""
    return "\n".join(
        [
            "# GPU memory",
            "",
            "What one GPU needs, estimated before any is asked for. A job that cannot fit at micro-batch 1 with",
            f"gradient checkpointing is refused: when {100 * MARGIN:.0f} % of the estimate is more than the profile's",
            "`memoryGiB`. Parameters are counted on the real classes; activations are measured on the same classes at",
            "real shapes without data (`bench/trainer/activations.py`, results in `bench/results/activations.json`);",
            f"reserved are {CONTEXT_GIB + WORKSPACE_GIB:.1f} GiB for CUDA and its libraries and",
            f"{100 * FRAGMENTATION:.0f} % for the allocator. The need is that of the largest of three moments:",
            "training, the encoding of images and captions before it (in fp32, at most eight images of 512 px at a",
            "time), and sample pictures.",
            "",
            "## Estimates",
            "",
            "GiB in bf16 with AdamW, LoRA of rank 16, micro-batch 1: in all, and only the training step, without and",
            "with gradient checkpointing; then the largest micro-batch (of at most 64) without it on cards of a size.",
            "",
            f"| network | method | resolution | in all | training | with checkpointing | {_cards()} |",
            f"|---|---|---|---|---|---|{'---|' * len(CARDS)}",
            *_rows(),
            "",
            "## Beside published measurements",
            "",
            "SimpleTuner's on an H100 (its documentation, `SEGMENTED_CHECKPOINTING.md`): peak GiB of a training step.",
            "Its LoKr has fewer weights than our LoRA of rank 16, and the page does not say how many text tokens SD3",
            "saw: without checkpointing, an estimate for SD3 may be low.",
            "",
            "| network | measured | resolution | micro-batch | checkpointing | published | estimate | error |",
            "|---|---|---|---|---|---|---|---|",
            *(_anchor(anchor) for anchor in ANCHORS),
            "",
            "## What goes into it",
            "",
            "- Weights: frozen ones in the run's precision, trained ones in fp32.",
            "- Gradients: 4 bytes per trained parameter. Optimizer: 8 for AdamW, 2 for AdamW8bit, next to nothing for",
            "  Adafactor, 16 for Prodigy, 4 for Lion. An average (`ema`): 4.",
            "- Activations: a line in micro-batch and image area. Where all weights are trained in bf16, the copies",
            "  that autocast makes of them are in it. When they are gone, at most 256 MiB are taken by what",
            "  is computed of all weights: the sum over several GPUs, and temporaries of Lion and Prodigy.",
            "- Encoders: VAE and CLIP in fp32, T5 in the run's precision.",
            "  In a step, where they are trained, those of CLIP: T5 never is.",
            "",
        ]
    )


def _cards() -> str:
    return " | ".join(f"{card} GiB" for card in CARDS)


def _rows() -> Iterator[str]:
    for name in NETWORKS:
        if name == "UNet2D":
            yield _row(name, "Unconditional", 64)
            yield _row(name, "Unconditional", 256)
            continue
        for method in ("LoRA", "FineTune"):
            for resolution in (512, 768, 1024):
                yield _row(name, method, resolution)


def _row(name: Architecture, method: str, resolution: int) -> str:
    spec = spec_of(method, resolution, batchSize=64)
    need = estimate(spec, family=name, micro_batch=1)
    less = estimate(spec, family=name, micro_batch=1, checkpointing=True)
    fit = " | ".join(str(largest_micro_batch(spec, name, card) or "-") for card in CARDS)
    return (
        f"| {name} | {method} | {resolution} | {need.total_gib:.1f} | {need.moments['Training']:.1f} | "
        f"{less.moments['Training']:.1f} | {fit} |"
    )


def _anchor(anchor: Anchor) -> str:
    found = trained_gib(anchor)
    return (
        f"| {anchor.architecture} | {anchor.what} | {anchor.resolution} | {anchor.micro_batch} | "
        f"{'yes' if anchor.checkpointing else 'no'} | {anchor.gib:g} | {found:.1f} | "
        f"{100 * (found / anchor.gib - 1):+.0f} % |"
    )
