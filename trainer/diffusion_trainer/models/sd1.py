"""Stable Diffusion 1.x: UNet with cross-attention, CLIP-L's last hidden state, four-channel VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.models.base import Conditioning, Targets
from diffusion_trainer.models.latent import CLIP_TOKENS, TextToImage, token_ids, unet_targets


class StableDiffusion1(TextToImage):
    """The family SD1; see `models.base.Family`. Conditioning: `text` [77, D]."""

    name: FamilyName = "SD1"
    conditioning_names = ("text",)
    token_names = ("tokens",)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102 - as in `Family`; likewise below
        return {"tokens": token_ids(self.tokenizers["tokenizer"], captions, length=CLIP_TOKENS)}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        # Without an attention mask, as the model was trained: it attends to the padding.
        encoder = self.text_encoders["text_encoder"]
        return {"text": encoder(tokens["tokens"].to(encoder.device)).last_hidden_state}

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:  # noqa: ARG002, D102
        predicted: Tensor = self.denoiser(noisy, times, conditioning["text"]).sample
        return predicted

    def lora_target_modules(self, targets: Targets) -> list[str]:  # noqa: D102
        return unet_targets(targets)
