"""A model's files and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from diffusion_trainer.models.origins import origins


class ModelFiles:
    """The folder of a model that `check_files` has passed, and its weight files by their path in it."""

    def __init__(self, folder: Path, weights: dict[str, Path]) -> None:
        self.folder = folder
        self.weights = weights
        self._hashes: dict[str, str] = {}

    def digest(self, encoders: Sequence[str], tokenizers: Sequence[str] = ()) -> str:
        """Return the sha256 of some components: weights and configurations of encoders, all of tokenizers."""
        wanted: list[str] = []
        for component in encoders:
            wanted += [relative for relative in self.weights if relative.startswith(f"{component}/")]
            wanted.append(f"{component}/config.json")
        for component in tokenizers:
            wanted += sorted(f"{component}/{path.name}" for path in (self.folder / component).glob("*"))
        content = {relative: self._hash(relative) for relative in wanted}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of each weight file, or of the file that it was converted from."""
        noted = origins(self.folder)
        return {relative: noted.get(relative) or self._hash(relative) for relative in sorted(self.weights)}

    def _hash(self, relative: str) -> str:
        if relative not in self._hashes:
            with (self.folder / relative).open("rb") as file:
                self._hashes[relative] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[relative]
