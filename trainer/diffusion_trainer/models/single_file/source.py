"""A single file as the store of a model's folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusion_trainer.errors import InputMissing, NotFound
from diffusion_trainer.models.origins import note_origin
from diffusion_trainer.models.single_file.configurations import configurations, family_of, weights
from diffusion_trainer.models.single_file.header import Shapes, elements, read_shapes
from diffusion_trainer.models.single_file.published import TEXTS
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

    def __init__(
        self, store: ObjectStore, key: str, *, elsewhere: Callable[[], Collection[str]] = frozenset[str]
    ) -> None:
        """Take the store of the file's folder, and the file's key; nothing is contacted yet.

        `elsewhere` returns the components (folders) that another place supplies, which the file may lack.
        """
        self._store = store
        self._key = key
        self._elsewhere = elsewhere
        self._lock = threading.Lock()
        self._digest = ""

    @property
    def uri(self) -> str:
        """Return the URI of the file."""
        return self._store.uri + self._key

    def list(self) -> Iterator[ObjectInfo]:
        """Yield the files of the folder.

        Raises `InputMissing` when the file is not there or lacks text encoders, `BadData` when it is no known model.
        """
        self._check_whole()
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
        config = self._configs[f"{component}/config.json"]
        write_component(original, self._weights[key], config=config, path=path, where=self.uri)

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

    def _check_whole(self) -> None:
        family = family_of(self._shapes, where=self.uri)
        needed = [name for text in TEXTS[family] for name in (text, text.replace("text_encoder", "tokenizer"))]
        there = {key.partition("/")[0] for key in self._configs} | self._supplied
        lacking = sorted(name for name in needed if name not in there)
        if lacking:
            raise InputMissing(
                f"model.source {self.uri} is a single file of {family} that has no {', '.join(lacking)}; set "
                "model.textEncoder.source to a folder with them, such as that of another model of this family in "
                "diffusers layout"
            )

    @cached_property
    def _supplied(self) -> frozenset[str]:
        return frozenset(self._elsewhere())

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return configurations(self._shapes, where=self.uri, supplied=self._supplied)

    @cached_property
    def _weights(self) -> dict[str, str]:
        """The files of weights, and where in the single file they come from."""
        places = weights(self._shapes, family_of(self._shapes, where=self.uri), self._supplied)
        return {f"{name}/{_TEXT if name.startswith('text') else _NETWORK}": place for name, place in places.items()}

    @cached_property
    def _made(self) -> dict[str, bytes]:
        """What is not converted but made, by key."""
        made = {key: json.dumps(config, indent=2).encode() for key, config in self._configs.items()}
        tokenizers = [key.partition("/")[0] for key in self._configs if key.endswith("/tokenizer_config.json")]
        words = tokenizer_files() if tokenizers else {}
        return made | {f"{folder}/{file}": content for folder in tokenizers for file, content in words.items()}
