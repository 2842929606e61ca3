"""A checkpoint in one file, by the original repositories' names, read as the folder in diffusers layout it stands for.

Belongs here: the file's header, the configurations that follow from the shapes in it, the tokenizer that it does not
hold, and its weights by diffusers' names. Does not belong here: writing such files (`export`).

Nothing here imports torch before weights are converted: the preflight needs the header alone.
"""

from diffusion_trainer.models.single_file.source import SingleFile

__all__ = ["SingleFile"]
