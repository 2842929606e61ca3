"""A model's files on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from diffusion_trainer.errors import BadData, InputMissing
from diffusion_trainer.models.inspection import INDEX, INDEX_SUFFIX, TRAINABLE, Component, is_shard
from diffusion_trainer.models.sources import Converted, Source
from diffusion_trainer.objectstore.base import ObjectInfo
from diffusion_trainer.objectstore.parallel import in_parallel

_PARALLEL = 4
_SMALL_SUFFIXES = (".json", ".txt")


def fetch_model(source: Source, work: Path, *, report: Callable[[str], None]) -> Path:
    """Download the files that loading needs (JSON, tokenizer, safetensors) and return their folder below `work`.

    Files that are there with the right size are kept: what was downloaded appears whole or not at all.

    Raises:
        InputMissing: there is no model_index.json at the source.
        BadData: the source contains code.

    """
    wanted = wanted_files(source)
    report(f"downloading the model ({sum(info.size for info in wanted.values()) / 1e9:.1f} GB)")
    return fetch_files(source, wanted, work / "model")


def fetch_files(source: Source, wanted: Mapping[str, ObjectInfo], folder: Path) -> Path:
    """Download files, by their keys, into a folder, which is returned; those of the right size are kept."""

    def fetch(key: str) -> None:
        path = folder / key
        if not _is_there(path, wanted[key]):
            path.parent.mkdir(parents=True, exist_ok=True)
            source.get_to_file(key, path)

    in_parallel(fetch, wanted, parallel=_PARALLEL)
    return folder


def _is_there(path: Path, info: ObjectInfo) -> bool:
    return path.is_file() and (isinstance(info, Converted) or path.stat().st_size == info.size)


def wanted_files(source: Source) -> dict[str, ObjectInfo]:
    """Return the files that loading may read, by their keys. Raises like `fetch_model`."""
    found = {info.key: info for info in source.list()}
    if INDEX not in found:
        raise InputMissing(
            f"model.source {source.uri} has no {INDEX}; give a folder in diffusers layout{_single_file(source, found)}"
        )
    code = next((key for key in found if key.endswith((".py", ".pyc", ".so"))), None)
    if code:
        raise BadData(f"model.source {source.uri}{code} is code, and code of models is never run; remove it")
    whole = {key for key in found if key.endswith(".safetensors")}
    return {key: info for key, info in found.items() if key == INDEX or _wanted(key, whole)}


def _single_file(source: Source, found: Collection[str]) -> str:
    """Return what there is to say of checkpoints in one file where a folder was looked for."""
    top = [key for key in found if "/" not in key]
    if source.uri.rstrip("/").endswith(".ckpt") or any(key.endswith(".ckpt") for key in top):
        return "; a .ckpt is a pickle, which runs code, and is never read: convert it to one .safetensors file"
    single = next((key for key in sorted(top) if key.endswith(".safetensors")), None)
    return f", or name the file itself: {source.uri}{single}" if single else ""


def _wanted(key: str, there: Collection[str]) -> bool:
    """Return whether loading may read it: not .bin files, fp16 variants, safety checkers and pictures.

    Which family it is says a file that has to be fetched first, so that the components of all of them count. Shards and
    their index do not when the whole file is `there`: diffusers would follow the index.
    """
    name, _, file = key.partition("/")
    components = [one[name] for one in TRAINABLE.values() if name in one]
    if not components or "/" in file:
        return False
    if file.endswith(_SMALL_SUFFIXES):
        return key.removesuffix(INDEX_SUFFIX) not in there
    return any(_holds_weights(name, file, component, there) for component in components)


def _holds_weights(name: str, file: str, component: Component, there: Collection[str]) -> bool:
    if not component.weights:
        return False
    return file == component.weights or (
        is_shard(file, component.weights) and f"{name}/{component.weights}" not in there
    )
