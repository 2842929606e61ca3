"""Model families: loading, encoding, and where adapters go. One file per family.

Belongs here: the `Family` protocol and its implementations, the check of a model's files before anything is loaded,
adapters. Does not belong here: losses and timesteps (`objective`), file formats of results (`export`).

Models are hostile input: safetensors only, no code from the model's folder, class names from an allow-list, no network.
"""

from diffusion_trainer.models.base import Family, NoiseSchedule
from diffusion_trainer.models.fetching import fetch_model
from diffusion_trainer.models.lora import add_lora, trainable
from diffusion_trainer.models.opening import open_model

__all__ = ["Family", "NoiseSchedule", "add_lora", "fetch_model", "open_model", "trainable"]
