"""Where a model's weights come from, when that is not a file of the same content: noted beside the model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from diffusion_trainer.objectstore.atomic import replaced


def note_origin(folder: Path, weights: str, *, sha256: str) -> None:
    """Note the hash of the file that some weights (a path in the model's folder) were converted from."""
    with replaced(_place(folder)) as file:
        file.write(json.dumps(origins(folder) | {weights: sha256}, sort_keys=True).encode())


def origins(folder: Path) -> dict[str, str]:
    """Return what was noted: the sha256 of the original file by the path of the weights."""
    place = _place(folder)
    return json.loads(place.read_bytes()) if place.is_file() else {}


def _place(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.origins.json")
