"""What the memory estimate knows of the published networks. Counted on the real classes.

Activations stand in `memory_activations.py`, which bench/trainer/activations.py writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from diffusion_api.memory_activations import ACTIVATIONS as MEASURED

Architecture = Literal["SD1", "SD2", "SDXL", "SD3-medium", "SD3.5-medium", "SD3.5-large", "UNet2D"]
Trained = Literal["Adapter", "Denoiser"]

_MISSING = object()


@dataclass(frozen=True)
class Line:
    """Bytes: fixed + micro_batch * (per_image + per_latent * latents)."""

    fixed: float
    per_image: float
    per_latent: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """One published network and what belongs to it. Numbers are of parameters unless they say otherwise."""

    parameters: int
    """Of the denoiser."""
    buffers: int = 0
    """Its position embeddings, which are no parameters and lie beside them."""
    attention: int = 0
    """Of its attention layers."""
    cross_attention: int = 0
    """Of those that attend to text."""
    lora_attention: int = 0
    """Of adapters of rank 1 on all attention layers."""
    lora_all: int = 0
    """Of adapters of rank 1 on attention and feed-forward layers."""
    vae: int = 0
    text_encoders: tuple[int, ...] = ()
    scale: int = 8
    """Pixels that one latent is wide."""
    marks: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    """Entries of config.json that tell it from every other network: value, and what stands for an absent entry."""

    @property
    def clip_encoders(self) -> tuple[int, ...]:
        """Of the text encoders that can be part of a step: all but T5."""
        return tuple(count for count in self.text_encoders if count < _T5)

    def latents(self, resolution: int) -> float:
        """Return the positions of a latent image with the area of a square of that side in pixels."""
        return (resolution / self.scale) ** 2

    @property
    def encoding(self) -> float:
        """Bytes per latent position while the VAE, in fp32, encodes an image."""
        return self._coding("Encoding")

    @property
    def decoding(self) -> float:
        """Bytes per latent position while the VAE, in fp32, decodes one."""
        return self._coding("Decoding")

    def _coding(self, what: str) -> float:
        # The first layers are the same for 4 and for 16 channels: there is one measurement of each kind.
        name = "SD3-medium" if self.buffers else "SD1"
        return MEASURED[f"{name}/{what}/FP32"][2]


def _unet(channels: tuple[int, ...], text: int) -> dict[str, tuple[object, object]]:
    return {
        "block_out_channels": (channels, _MISSING),
        "cross_attention_dim": (text, _MISSING),
        "layers_per_block": (2, 2),
        "in_channels": (4, 4),
    }


def _mmdit(layers: int, heads: int, *, normed: bool, dual: int) -> dict[str, tuple[object, object]]:
    return {
        "num_layers": (layers, _MISSING),
        "num_attention_heads": (heads, _MISSING),
        "qk_norm": ("rms_norm" if normed else None, None),
        "dual_attention_layers": (tuple(range(dual)), ()),
        "joint_attention_dim": (4096, _MISSING),
    }


_CLIP_L, _CLIP_H, _CLIP_G = 123_060_480, 340_387_840, 694_659_840
_T5 = 4_762_310_656
_SD3_TEXT = (123_650_304, _CLIP_G, _T5)
_VAE, _VAE_16 = 83_653_863, 83_819_683

NETWORKS: dict[Architecture, Network] = {
    "SD1": Network(
        parameters=859_520_964,
        attention=93_536_640,
        cross_attention=43_962_560,
        lora_attention=199_296,
        lora_all=374_016,
        vae=_VAE,
        text_encoders=(_CLIP_L,),
        marks=_unet((320, 640, 1280, 1280), 768),
    ),
    "SD2": Network(
        parameters=865_910_724,
        attention=99_926_400,
        cross_attention=50_352_320,
        lora_attention=207_488,
        lora_all=382_208,
        vae=_VAE,
        text_encoders=(_CLIP_H,),
        marks=_unet((320, 640, 1280, 1280), 1024),
    ),
    "SDXL": Network(
        parameters=2_567_463_684,
        attention=955_353_600,
        cross_attention=545_670_400,
        lora_attention=1_451_520,
        lora_all=2_616_320,
        vae=_VAE,
        text_encoders=(_CLIP_L, _CLIP_G),
        marks=_unet((320, 640, 1280), 2048),
    ),
    "SD3-medium": Network(
        parameters=2_028_328_000,
        buffers=56_623_104,
        attention=450_918_912,
        lora_attention=586_752,
        lora_all=1_308_672,
        vae=_VAE_16,
        text_encoders=_SD3_TEXT,
        marks=_mmdit(24, 24, normed=False, dual=0),
    ),
    "SD3.5-medium": Network(
        parameters=2_243_171_520,
        buffers=226_492_416,
        attention=573_689_984,
        cross_attention=122_764_928,
        lora_attention=746_496,
        lora_all=1_468_416,
        vae=_VAE_16,
        text_encoders=_SD3_TEXT,
        marks=_mmdit(24, 24, normed=True, dual=13),
    ),
    "SD3.5-large": Network(
        parameters=8_056_627_520,
        buffers=89_653_248,
        attention=1_792_877_696,
        lora_attention=1_473_792,
        lora_all=3_297_792,
        vae=_VAE_16,
        text_encoders=_SD3_TEXT,
        marks=_mmdit(38, 38, normed=True, dual=0),
    ),
    "UNet2D": Network(
        parameters=113_673_219,
        scale=1,
        marks={
            "block_out_channels": ((128, 128, 256, 256, 512, 512), _MISSING),
            "in_channels": (3, _MISSING),
            "layers_per_block": (2, 2),
            "cross_attention_dim": (None, None),
        },
    ),
}

ACTIVATIONS: dict[str, Line] = {name: Line(*numbers) for name, numbers in MEASURED.items()}
"""By `architecture/what is trained/precision[/checkpointing]`; a training step's, beside weights and gradients."""
