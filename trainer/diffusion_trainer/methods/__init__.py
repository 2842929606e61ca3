"""What is trained: which weights of a family, or what is added to it. One file per way of training.

Belongs here: making parameters trainable and naming them, what has to be done to them between two updates, dropout.
Does not belong here: losses (`objective`), networks and how they are called (`models`), file formats (`export`).

Names of parameters are stable and sorted: checkpoints and exports depend on them. What is trained is always fp32.
"""

from diffusion_trainer.methods.attaching import attach, check_captions
from diffusion_trainer.methods.base import Attached
from diffusion_trainer.methods.conditioning import TextPath
from diffusion_trainer.methods.random_denoiser import supply_denoiser

__all__ = ["Attached", "TextPath", "attach", "check_captions", "supply_denoiser"]
