"""New words: a token's embedding vectors are trained, and nothing else. Gal et al. 2022, arXiv 2208.01618."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_api.job import TrainerSpec
from diffusion_api.method import TextualInversion
from diffusion_trainer.errors import BadConfig
from diffusion_trainer.methods.base import Attached, named_group
from diffusion_trainer.methods.conditioning import TextPath
from diffusion_trainer.methods.text import clip_encoders, in_steps
from diffusion_trainer.models import Family

VECTORS = ".vectors"
"""The parameter of an encoder is called `text_encoder.vectors`."""


class ExtendedEmbedding(nn.Module):
    """Frozen embeddings with new rows behind them. Tokens: -1 is the first new one, -2 the second.

    They are negative because CLIP finds the end of a text as the highest token (where its configuration says
    eos_token_id 2, as SDXL's does): a new one must not be taken for it.
    """

    def __init__(self, base: nn.Embedding, vectors: Tensor) -> None:
        """`vectors`: [n, width]."""
        super().__init__()
        self.base = base
        self.vectors = nn.Parameter(vectors.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """Return the embeddings of the known tokens, as users of the module it replaces expect."""
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings [..., width]."""
        known = self.base(tokens.clamp(min=0))
        new = self.vectors[(-1 - tokens).clamp(min=0)]
        return torch.where((tokens < 0)[..., None], new, known)


def attach_embedding(family: Family, spec: TrainerSpec) -> Attached:
    """Freeze the model and give each of CLIP's text encoders the new token's vectors.

    They begin as the embedding of `initializerToken`. Weight decay does not apply: it would pull them to where no word
    is. Raises `BadConfig` when the token is known already or the initializer is not one token.
    """
    wanted = spec.textual_inversion
    if wanted is None:
        raise BadConfig("method TextualInversion needs textualInversion.token and initializerToken")
    family.denoiser.requires_grad_(requires_grad=False)
    parameters: dict[str, nn.Parameter] = {}
    longest: dict[str, float] = {}
    for folder, encoder in clip_encoders(family).items():
        tokenizer = family.tokenizers[folder.replace("text_encoder", "tokenizer")]
        known = len(tokenizer)
        start = _initializer(tokenizer, wanted)
        encoder.requires_grad_(requires_grad=False)
        embeddings = _embeddings(encoder)
        base: nn.Embedding = embeddings.token_embedding
        extended = ExtendedEmbedding(base, base.weight[start].expand(wanted.vectors, -1))
        embeddings.token_embedding = extended
        encoder.register_forward_pre_hook(_renumber(known), with_kwargs=True)
        parameters[folder + VECTORS] = extended.vectors
        longest[folder + VECTORS] = float(base.weight.float().norm(dim=1).max())
    return Attached(
        "Embedding",
        (named_group(parameters.items(), decayed=False),),
        (family.denoiser, *in_steps(family)),
        TextPath(family, live=True, written=partial(written, wanted=wanted), words=tuple(_words(wanted))),
        after_update=partial(_shorten_all, parameters, longest),
    )


def written(caption: str, wanted: TextualInversion) -> str:
    """Return a caption with all words of the new token where it has the first one, as diffusers writes them."""
    words = " ".join(_words(wanted))
    return re.sub(re.escape(wanted.token), lambda _: words, caption)


@torch.no_grad()
def shorten(vectors: Tensor, longest: float) -> None:
    """Scale vectors [n, width] that are longer than the longest known word's back to that length, in place."""
    norms = vectors.norm(dim=1, keepdim=True)
    vectors.mul_((longest / norms).clamp(max=1.0))


def _shorten_all(parameters: Mapping[str, Tensor], longest: Mapping[str, float]) -> None:
    for name, vectors in parameters.items():
        shorten(vectors, longest[name])


def _words(wanted: TextualInversion) -> list[str]:
    return [wanted.token, *(f"{wanted.token}_{i}" for i in range(1, wanted.vectors))]


def _initializer(tokenizer: Any, wanted: TextualInversion) -> int:
    """Teach a tokenizer the new token's words and return the id of the one to start from."""
    start = tokenizer.encode(wanted.initializer_token, add_special_tokens=False)
    if len(start) != 1:
        raise BadConfig(
            f"textualInversion.initializerToken {wanted.initializer_token!r} is {len(start)} tokens for this model; "
            "use a single common word"
        )
    known, words = len(tokenizer), _words(wanted)
    tokenizer.add_tokens(words)
    if tokenizer.encode(written(wanted.token, wanted), add_special_tokens=False) != [*range(known, known + len(words))]:
        raise BadConfig(
            f"textualInversion.token {wanted.token!r} is a word of this model already, or its tokenizer cannot tell it "
            "from others; use lower-case letters between < and >, e.g. <my-cat>"
        )
    return int(start[0])


def _renumber(known: int) -> Any:
    """Return a hook that gives new tokens their negative numbers before an encoder sees them."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = args[0] if args else kwargs.pop("input_ids")
        return (torch.where(tokens < known, tokens, known - 1 - tokens), *args[1:]), kwargs

    return hook


def _embeddings(encoder: nn.Module) -> Any:
    return getattr(encoder, "text_model", encoder).embeddings
