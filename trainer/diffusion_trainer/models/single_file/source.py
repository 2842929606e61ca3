"""A single file as the store of a model's folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusion_trainer.errors import InputMissing, NotFound
from diffusion_trainer.models.origins import note_origin
from diffusion_trainer.models.single_file.configurations import TEXTS, UNET, VAE, configurations, family_of
from diffusion_trainer.models.single_file.header import Shapes, elements, read_shapes
from diffusion_trainer.models.single_file.vocabulary import tokenizer_files
from diffusion_trainer.models.sources import Converted
from diffusion_trainer.objectstore import ObjectStore
from diffusion_trainer.objectstore.atomic import replaced
from diffusion_trainer.objectstore.base import ObjectInfo

_NETWORK, _TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"


class SingleFile:
    """The folder in diffusers layout that a checkpoint in one file stands for; see `models.sources.Source`.

    Configurations are made from the file's header. The file itself is downloaded when the first of the weights is asked
    for, and stays beside the model's folder.
    """

    def __init__(self, store: ObjectStore, key: str) -> None:
        """Take the store of the file's folder, and the file's key; nothing is contacted yet."""
        self._store = store
        self._key = key
        self._lock = threading.Lock()
        self._digest = ""

    @property
    def uri(self) -> str:
        """Return the URI of the file."""
        return self._store.uri + self._key

    def list(self) -> Iterator[ObjectInfo]:
        """Yield the files of the folder. Raises `InputMissing`, and `BadData` when the file is no known model."""
        for key, content in self._made.items():
            yield ObjectInfo(key, len(content), self._info.etag, self._info.modified)
        for key, prefix in self._weights.items():
            about = self._info.size * elements(self._shapes, prefix) // max(elements(self._shapes, ""), 1)
            yield Converted(key, about, self._info.etag, self._info.modified)

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:
        """Write one of the files."""
        if key in self._made:
            with replaced(path) as file:
                file.write(self._made[key])
        else:
            with self._lock:  # one download for all of them, and one component in memory at a time
                self._convert(key, path)
        return ObjectInfo(key, path.stat().st_size, self._info.etag, self._info.modified)

    def _convert(self, key: str, path: Path) -> None:
        from diffusion_trainer.models.single_file.weights import write_component

        folder = path.parents[1]
        original = folder.with_name(f"{folder.name}.original.safetensors")
        if not original.is_file() or original.stat().st_size != self._info.size:
            self._store.get_to_file(self._key, original)
        note_origin(folder, key, sha256=self._sha(original))
        component = key.partition("/")[0]
        write_component(original, self._weights[key], config=self._configs[f"{component}/config.json"], path=path)

    def _sha(self, original: Path) -> str:
        if not self._digest:
            with original.open("rb") as file:
                self._digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digest

    @cached_property
    def _info(self) -> ObjectInfo:
        try:
            return self._store.head(self._key)
        except NotFound as error:
            raise InputMissing(f"model.source {self.uri} is not there; correct the name") from error

    @cached_property
    def _shapes(self) -> Shapes:
        def read(offset: int, length: int) -> bytes:
            return self._store.get_range(self._key, offset=offset, length=length)

        return read_shapes(read, size=self._info.size, where=self.uri)

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return configurations(self._shapes, where=self.uri)

    @cached_property
    def _weights(self) -> dict[str, str]:
        """The files of weights, and where in the single file they come from."""
        texts = TEXTS[family_of(self._shapes, where=self.uri)]
        return {f"unet/{_NETWORK}": UNET, f"vae/{_NETWORK}": VAE} | {
            f"{name}/{_TEXT}": prefix for name, prefix in texts.items()
        }

    @cached_property
    def _made(self) -> dict[str, bytes]:
        """What is not converted but made, by key."""
        made = {key: json.dumps(config, indent=2).encode() for key, config in self._configs.items()}
        words = tokenizer_files()
        for key in self._configs:
            folder, _, name = key.partition("/")
            if name == "tokenizer_config.json":
                made |= {f"{folder}/{file}": content for file, content in words.items()}
        return made
