"""A CLIP model: pictures and texts in, features out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion_trainer.errors import BadData
from diffusion_trainer.models.loading import load_text_encoder, load_tokenizer
from diffusion_trainer.scoring.files import FIELD, PICTURES


class Clip:
    """Both towers, in fp32, without gradients. It waits on the CPU and is on the device within `on` only.

    It is also the pair of a model and a processor that torchmetrics' `clip_score` asks for, which knows transformers'
    own pair of releases before 5 only: since then `get_image_features` returns more than features.
    """

    def __init__(self, model: Any, tokenizer: Any, eye: Any) -> None:
        """`eye` is what makes pixels of pictures as the model wants them."""
        self._model = model
        self._tokenizer = tokenizer
        self._eye = eye
        self.config = model.config

    @classmethod
    def open(cls, folder: Path) -> Clip:
        """Load a model whose files were checked. Raises `BadData`."""
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        with torch.random.fork_rng(devices=[]):  # weights are never drawn, and nobody's numbers are to move
            model = load_text_encoder(CLIPModel, folder)
        tokenizer = load_tokenizer(CLIPTokenizer, folder, model.text_model)
        try:
            eye = CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            seen = eye(images=[Image.new("RGB", (64, 48))], return_tensors="pt")["pixel_values"].shape
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadData(f"{FIELD}: {PICTURES} cannot be used ({error}); replace it by the original file") from error
        side = model.config.vision_config.image_size
        if tuple(seen) != (1, 3, side, side):
            raise BadData(
                f"{FIELD}: {PICTURES} makes pictures of {seen[-1]} x {seen[-2]}, and the model takes {side} x {side}; "
                "they belong to different models: use the file that came with the model"
            )
        return cls(model, tokenizer, eye)

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Have it on a device for a while."""
        self._model.to(device)
        try:
            yield
        finally:
            self._model.to("cpu")

    def look_at(self, picture: Image.Image) -> Tensor:
        """Return the features of a picture, fp32 [D], on the CPU."""
        return self.get_image_features(self._pixels([picture]))[0].cpu()

    def __call__(self, *, images: Sequence[Tensor] = (), text: Sequence[str] = (), **_: object) -> Mapping[str, Tensor]:
        """Return what the model is fed: of pictures (uint8 [3, height, width]), or of texts, cut where it ends."""
        if not text:
            return {"pixel_values": self._pixels([_picture(image) for image in images])}
        length = self.config.text_config.max_position_embeddings
        found = self._tokenizer(list(text), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """Return the projected features of pixels."""
        with torch.no_grad():
            features: Tensor = self._model.get_image_features(pixels.to(self._model.device)).pooler_output
        return features

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the projected features of tokens."""
        device = self._model.device
        with torch.no_grad():
            features: Tensor = self._model.get_text_features(tokens.to(device), mask.to(device)).pooler_output
        return features

    def to(self, _: object) -> Clip:
        """Stay: where the model is says `on`."""
        return self

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels: Tensor = self._eye(images=list(pictures), return_tensors="pt")["pixel_values"]
        return pixels


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
