"""What families with a VAE and text encoders have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.models.autoencoder import Autoencoder
from diffusion_trainer.models.files import ModelFiles
from diffusion_trainer.models.inspection import TRAINABLE
from diffusion_trainer.models.loading import load_discrete_process, load_text_encoder, load_tokenizer, loaded, release
from diffusion_trainer.objective import Process

CLIP_TOKENS = 77
_ATTENTION = ["to_k", "to_out.0", "to_q", "to_v"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]


class TextToImage(ABC):
    """The encoders of a text-to-image model, in fp32 and on the CPU until they are used; see `models.base.Family`.

    A family says what becomes of captions (`tokenize`, `encode_tokens`) and how its denoiser is called (`predict`).
    """

    name: FamilyName
    denoiser_folder = "unet"
    latent_scale = 8
    reads_most: tuple[str, int] = ("tokenizer", CLIP_TOKENS)
    """The tokenizer whose text encoder reads most, and how many tokens that is, marks of begin and end among them."""

    def __init__(
        self, files: ModelFiles, *, device: torch.device, dtype: torch.dtype, weights_dtype: torch.dtype
    ) -> None:
        """Load from a folder that has been checked. T5, which is larger than the denoiser, is kept in its dtype."""
        import diffusers
        import transformers

        folder, components = files.folder, TRAINABLE[self.name]
        self.device = device
        self.dtype = dtype
        self._files = files
        self._autoencoder = Autoencoder(folder, device=device)
        network = getattr(diffusers, components[self.denoiser_folder].kind)
        self.denoiser: Any = loaded(network, folder / self.denoiser_folder, torch_dtype=weights_dtype).to(device)
        self.text_encoders: dict[str, Any] = {}
        self.tokenizers: dict[str, Any] = {}
        for name in (name for name in components if name.startswith("text_encoder")):
            kind, tokenizer = components[name].kind, name.replace("text_encoder", "tokenizer")
            precision = dtype if kind == "T5EncoderModel" else torch.float32
            encoder = load_text_encoder(getattr(transformers, kind), folder / name, dtype=precision)
            words = getattr(transformers, components[tokenizer].kind)
            self.text_encoders[name] = encoder
            self.tokenizers[tokenizer] = load_tokenizer(words, folder / tokenizer, encoder)
        self.process = self.load_process(folder)

    def load_process(self, folder: Path) -> Process:
        """Return the forward process that the model's noise scheduler describes."""
        return load_discrete_process(folder)

    @property
    def size_multiple(self) -> int:  # noqa: D102 - as in `Family`; likewise below
        return self.latent_scale

    @property
    def latent_channels(self) -> int:  # noqa: D102
        return self._autoencoder.channels

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return what of captions no training changes, as in `Family`."""

    @abstractmethod
    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditioning of that, as in `Family`."""

    def cut_off(self, captions: Sequence[str]) -> list[str]:  # noqa: D102
        folder, most = self.reads_most
        tokens = self.tokenizers[folder](list(captions), verbose=False).input_ids if captions else []
        return [caption for caption, found in zip(captions, tokens, strict=True) if len(found) > most]

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102
        for encoder in self.text_encoders.values():
            encoder.to(self.device)
        with torch.no_grad():
            encoded = self.encode_tokens(self.tokenize(captions))
        return {name: tensor.float().cpu() for name, tensor in encoded.items()}

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self._autoencoder.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:  # noqa: D102
        return self._autoencoder.decode(latents)

    def vae_hash(self) -> str:  # noqa: D102
        return self._files.digest(["vae"])

    def text_hash(self) -> str:  # noqa: D102
        return self._files.digest(list(self.text_encoders), list(self.tokenizers))

    def weight_files(self) -> dict[str, Path]:  # noqa: D102
        return dict(self._files.weights)

    def file_hashes(self) -> dict[str, str]:  # noqa: D102
        return self._files.hashes()

    def release_encoders(self) -> None:  # noqa: D102
        self._autoencoder.release()
        for encoder in self.text_encoders.values():
            release(encoder)


def unet_targets(targets: str) -> list[str]:
    """Return the linear layers of a UNet's transformer blocks that get adapters."""
    return _ATTENTION if targets == "Attention" else sorted(_ATTENTION + _FEED_FORWARD)


def token_ids(tokenizer: Any, captions: Sequence[str], *, length: int) -> Tensor:
    """Return tokens [B, length], cut or padded to that length."""
    found: Tensor = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return found
