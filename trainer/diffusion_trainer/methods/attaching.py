"""From a job's method to what is trained."""

from __future__ import annotations

from collections.abc import Iterable

from diffusion_api.job import TrainerSpec
from diffusion_trainer.errors import BadData
from diffusion_trainer.methods.base import Attached
from diffusion_trainer.methods.fine_tune import attach_weights
from diffusion_trainer.methods.from_scratch import initialise
from diffusion_trainer.methods.lora import attach_lora
from diffusion_trainer.methods.textual_inversion import attach_embedding
from diffusion_trainer.models import Family


def attach(family: Family, spec: TrainerSpec, *, seed: int) -> Attached:
    """Make trainable what the job's method trains, in place; the rest of the family is frozen.

    The model means what it meant before, except that FromScratch makes it forget everything.

    Raises:
        BadConfig: a new token is a word already, or the one that it begins as is no word.

    """
    if spec.trains == "Adapter":
        return attach_lora(family, spec, seed=seed)
    if spec.trains == "Embedding":
        return attach_embedding(family, spec)
    if spec.method == "FromScratch":
        initialise(family.denoiser, seed=seed)
    return attach_weights(family, spec)


def check_captions(spec: TrainerSpec, captions: Iterable[str]) -> None:
    """Raise `BadData` when a new token is not in every caption: an image without it would teach it nothing."""
    if spec.textual_inversion is None:
        return
    token = spec.textual_inversion.token
    without = [caption for caption in captions if token not in caption]
    if without:
        raise BadData(
            f"textualInversion.token {token!r} is not in {len(without)} of the captions, e.g. {without[0]!r}: write it "
            f"into them, or set dataset.captions.prefix, e.g. 'a photo of {token}, '"
        )
