"""What writes a format of what was trained, and where it lies in the destination."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from diffusion_api import names
from diffusion_api.combinations import Format, Kind
from diffusion_api.job import TrainerSpec
from diffusion_trainer.export.diffusers_format import export_diffusers
from diffusion_trainer.export.embedding import export_emb_params, export_learned_embeds
from diffusion_trainer.export.kohya_format import export_kohya
from diffusion_trainer.export.model_folder import export_model_folder
from diffusion_trainer.export.single_file import export_single_file
from diffusion_trainer.models.base import Family


class Writer(Protocol):
    """Writes weights, by the names of `methods`, into a folder, and returns the files."""

    def __call__(self, weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec, *, folder: Path) -> list[Path]:
        """Write."""
        ...


_FOLDERS: dict[Format, str] = {
    "Diffusers": names.EXPORT_DIFFUSERS,
    "Kohya": names.EXPORT_KOHYA,
    "SingleFile": names.EXPORT_SINGLE_FILE,
}
_WRITERS: dict[tuple[Kind, Format], Writer] = {
    ("Adapter", "Diffusers"): export_diffusers,
    ("Adapter", "Kohya"): export_kohya,
    ("Adapter", "SingleFile"): export_single_file,
    ("Weights", "Diffusers"): export_model_folder,
    ("Weights", "SingleFile"): export_single_file,
    ("Embedding", "Diffusers"): export_learned_embeds,
    ("Embedding", "Kohya"): export_emb_params,
}


def writer_of(kind: Kind, wanted: Format) -> tuple[str, Writer]:
    """Return the folder of a format in the destination, and what writes it. The contract refuses other pairs."""
    return _FOLDERS[wanted], _WRITERS[kind, wanted]
