"""The way from captions to conditioning: through what is cached, whatever that is, to the denoiser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_trainer.models.base import Conditioning, Family


@dataclass(frozen=True)
class TextPath:
    """Where text encoders are frozen, what they say is cached; where CLIP is part of a step (live), its tokens are.

    Of T5, which never is, what it says is cached either way.
    """

    family: Family
    live: bool = False
    written: Callable[[str], str] = str
    """What a caption or a prompt is before it is tokenized."""
    words: tuple[str, ...] = ()
    """Words that the tokenizers were taught."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of what is cached of a caption."""
        return self.family.token_names if self.live else self.family.conditioning_names

    @property
    def hash(self) -> str:
        """Return the sha256 of everything that decides what `cached` returns for a caption."""
        content = [self.family.text_hash(), *self.words]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest() if self.words else content[0]

    def cached(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return what is cached of captions: tensors [B, ...] on the CPU by name."""
        texts = [self.written(caption) for caption in captions]
        return self.family.tokenize(texts) if self.live else self.family.encode_text(texts)

    def cut_off(self, captions: Sequence[str]) -> list[str]:
        """Return the captions whose end no text encoder reads."""
        found = set(self.family.cut_off([self.written(caption) for caption in captions]))
        return [caption for caption in captions if self.written(caption) in found]

    def conditioning(self, cached: Conditioning) -> Conditioning:
        """Return the conditioning of what was cached; from tokens, gradients pass to the text encoders."""
        return self.family.encode_tokens(cached) if self.live else cached

    def encode(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the conditioning of captions as of now, without gradients."""
        with torch.no_grad():
            return self.conditioning(self.cached(captions))
