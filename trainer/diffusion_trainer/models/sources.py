"""Where a model's files come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from diffusion_trainer.errors import InputMissing
from diffusion_trainer.objectstore.base import ObjectInfo

_VAE, _CONFIG = "vae/", "config.json"
_TEXT = ("text_encoder", "tokenizer")
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FOLDED = {
    "config.json": "unet/config.json",
    _WEIGHTS: f"unet/{_WEIGHTS}",
    "scheduler_config.json": "scheduler/scheduler_config.json",
}
_BESIDE = {folded: beside for beside, folded in _FOLDED.items()}


@dataclass(frozen=True, slots=True)
class Converted(ObjectInfo):
    """A file that is made on this machine out of another one; its size is a guess."""


class Source(Protocol):
    """What is asked of the store of a model."""

    @property
    def uri(self) -> str:
        """Return the URI of the model's folder, for messages."""
        ...

    def list(self) -> Iterator[ObjectInfo]:
        """Yield the model's files."""
        ...

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:
        """Download one of them."""
        ...


class Unfolded:
    """A model in diffusers layout whose one network may lie beside model_index.json, with its noise scheduler.

    So do the published unconditional ones (google/ddpm-*); diffusers looks there for a component without a folder.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def uri(self) -> str:
        """Return the URI of the model's folder."""
        return self._source.uri

    def list(self) -> Iterator[ObjectInfo]:
        """Yield the model's files, those of such a network by the keys that they have in a folder of its own."""
        for info in self._found:
            yield replace(info, key=_FOLDED.get(info.key, info.key)) if self._beside else info

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:
        """Download a file that `list` named."""
        return self._source.get_to_file(_BESIDE.get(key, key) if self._beside else key, path)

    @cached_property
    def _found(self) -> tuple[ObjectInfo, ...]:
        return tuple(self._source.list())

    @cached_property
    def _beside(self) -> bool:
        keys = {info.key for info in self._found}
        return set(_FOLDED) - {_WEIGHTS} <= keys and not any(key.startswith("unet/") for key in keys)


class WithOtherVae:
    """A model whose folder `vae/` is another one: that of a VAE alone, or of another model."""

    def __init__(self, model: Source, vae: Source) -> None:
        self._model = model
        self._vae = vae
        self._inside = ""

    @property
    def uri(self) -> str:
        """Return the URI of the model's folder."""
        return self._model.uri

    def list(self) -> Iterator[ObjectInfo]:
        """Yield the model's files but those of its VAE, and the other VAE's in their place.

        Raises `InputMissing` when there is no VAE at that place.
        """
        yield from (info for info in self._model.list() if not info.key.startswith(_VAE))
        others = {info.key: info for info in self._vae.list()}
        if _CONFIG not in others and _VAE + _CONFIG not in others:
            raise InputMissing(
                f"model.vae {self._vae.uri} has no {_CONFIG}; give the folder of a VAE, or of a model, in diffusers "
                "layout"
            )
        self._inside = "" if _CONFIG in others else _VAE
        for key, info in others.items():
            if key.startswith(self._inside):
                yield replace(info, key=_VAE + key.removeprefix(self._inside))

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:
        """Download a file that `list` named."""
        if key.startswith(_VAE):
            return self._vae.get_to_file(self._inside + key.removeprefix(_VAE), path)
        return self._model.get_to_file(key, path)


class WithOtherText:
    """A model whose folders `text_encoder*/` and `tokenizer*/` are another place's, as far as that has them."""

    def __init__(self, model: Source, text: TextFolders) -> None:
        self._model = model
        self._text = text

    @property
    def uri(self) -> str:
        """Return the URI of the model's folder."""
        return self._model.uri

    def list(self) -> Iterator[ObjectInfo]:
        """Yield the model's files but those that the other place has, too, and that one's in their place."""
        yield from (info for info in self._model.list() if _component(info.key) not in self._text.components)
        yield from self._text.files

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:
        """Download a file that `list` named."""
        if _component(key) in self._text.components:
            return self._text.source.get_to_file(key, path)
        return self._model.get_to_file(key, path)


class TextFolders:
    """What there is at `model.textEncoder.source`."""

    def __init__(self, source: Source) -> None:
        """Take the place; nothing is contacted yet."""
        self.source = source

    @cached_property
    def files(self) -> tuple[ObjectInfo, ...]:
        """The files of text encoders and tokenizers. Raises `InputMissing` when there is none."""
        found = tuple(info for info in self.source.list() if _component(info.key).startswith(_TEXT))
        if not found:
            raise InputMissing(
                f"model.textEncoder.source {self.source.uri} has no folder text_encoder* or tokenizer*; give the "
                "folder of a model in diffusers layout"
            )
        return found

    @cached_property
    def components(self) -> frozenset[str]:
        """The text encoders and tokenizers that are there, by their folders."""
        return frozenset(_component(info.key) for info in self.files)


def _component(key: str) -> str:
    """Return the folder of a component that a file is in, "" for one beside them."""
    folder, slash, _ = key.partition("/")
    return folder if slash else ""
