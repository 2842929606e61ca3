"""`spec.method` and its members: what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from diffusion_api.meta import ApiModel, Cel, cel

Method = Literal["LoRA", "DreamBooth", "FineTune", "FromScratch", "Unconditional", "TextualInversion"]


class LoRA(ApiModel):
    """Low-rank adapters on the denoiser. Hu et al. 2021, arXiv 2106.09685."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update. 8 to 32 suits most subjects and styles; more learns more and overfits sooner."""
    alpha: Annotated[float, Field(gt=0, le=1024)] = 16
    """Scale of the update is alpha / rank. Equal to rank, it is 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    """Probability of dropping an input of the adapter while training."""
    targets: Literal["Attention", "AttentionAndFeedForward"] = "AttentionAndFeedForward"
    """Which linear layers get an adapter."""
    use_dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353): slower, often better at low rank."""


_PRIOR_RULE = "self.priorLossWeight == 0.0 || (has(self.classPrompt) && self.classPrompt != '' && self.classImages > 0)"
PRIOR_MESSAGE = (
    "priorLossWeight is above 0, so classPrompt (a photo of a dog) and classImages (200) are needed; or set "
    "priorLossWeight: 0"
)


class DreamBooth(ApiModel):
    """A subject bound to a rare token. Ruiz et al. 2022, arXiv 2208.12242."""

    model_config = ConfigDict(json_schema_extra=cel(Cel(_PRIOR_RULE, PRIOR_MESSAGE)))

    instance_prompt: Annotated[str, Field(min_length=1, max_length=1024)]
    """Caption of every instance image, with the rare token: `a photo of sks dog`."""
    class_prompt: Annotated[str, Field(max_length=1024)] | None = None
    """Caption of the class images, without the token: `a photo of a dog`. Needed when priorLossWeight is above 0."""
    prior_loss_weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Weight of the class images' loss; 0 turns prior preservation off."""
    class_images: Annotated[int, Field(ge=0, le=10000)] = 200
    """Class images to train with. The base model draws them before the training, and they are kept beside the
    checkpoints. Every other image of a batch is one of them."""
    adapter: Literal["LoRA", "None"] = "LoRA"
    """`LoRA` trains adapters (see lora), `None` the whole denoiser, by default with a learning rate of 5e-6."""

    @property
    def preserves_prior(self) -> bool:
        """Whether class images are trained on as well."""
        return self.prior_loss_weight > 0


class FineTune(ApiModel):
    """Full fine-tuning of the denoiser."""

    parts: Literal["All", "Attention", "CrossAttention"] = "All"
    """Which of the denoiser's weights are trained."""


class TextualInversion(ApiModel):
    """New token embeddings, everything else frozen. Gal et al. 2022, arXiv 2208.01618."""

    token: Annotated[str, Field(min_length=1, max_length=64)]
    """The new token, e.g. `<my-cat>`."""
    initializer_token: Annotated[str, Field(min_length=1, max_length=64)]
    """An existing single token to start from, e.g. `cat`."""
    vectors: Annotated[int, Field(ge=1, le=64)] = 1
    """Embedding vectors of the new token."""


MEMBERS = {
    "LoRA": "lora",
    "DreamBooth": "dreamBooth",
    "FineTune": "fineTune",
    "TextualInversion": "textualInversion",
}
"""The member that belongs to a method; a DreamBooth with an adapter also reads `lora`."""
