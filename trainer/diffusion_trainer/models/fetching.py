"""A model's files on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from diffusion_trainer.errors import BadData, InputMissing
from diffusion_trainer.models.inspection import INDEX, TRAINABLE, Component, is_shard
from diffusion_trainer.models.sources import Source
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
    sizes = wanted_files(source)
    folder = work / "model"
    report(f"downloading the model ({sum(sizes.values()) / 1e9:.1f} GB)")

    def fetch(key: str) -> None:
        path = folder / key
        if not path.is_file() or path.stat().st_size != sizes[key]:
            path.parent.mkdir(parents=True, exist_ok=True)
            source.get_to_file(key, path)

    in_parallel(fetch, sizes, parallel=_PARALLEL)
    return folder


def wanted_files(source: Source) -> dict[str, int]:
    """Return the keys that loading may read and their bytes. Raises like `fetch_model`."""
    found = {info.key: info.size for info in source.list()}
    if INDEX not in found:
        files = [source.uri.rstrip("/"), *(key for key in found if "/" not in key)]
        single = any(file.endswith((".safetensors", ".ckpt")) for file in files)
        raise InputMissing(
            f"model.source {source.uri} has no {INDEX}; give a folder in diffusers layout"
            + (", single-file checkpoints are not read yet" if single else "")
        )
    code = next((key for key in found if key.endswith((".py", ".pyc", ".so"))), None)
    if code:
        raise BadData(f"model.source {source.uri}{code} is code, and code of models is never run; remove it")
    whole = {key for key in found if key.endswith(".safetensors")}
    return {key: size for key, size in found.items() if key == INDEX or _wanted(key, whole)}


def _wanted(key: str, there: Collection[str]) -> bool:
    """Return whether loading may read it: not .bin files, fp16 variants, safety checkers and pictures.

    Which family it is says a file that has to be fetched first, so that the components of all of them count. Shards do
    not when the whole file is `there`.
    """
    name, _, file = key.partition("/")
    components = [one[name] for one in TRAINABLE.values() if name in one]
    if not components or "/" in file:
        return False
    if file.endswith(_SMALL_SUFFIXES):
        return True
    return any(_holds_weights(name, file, component, there) for component in components)


def _holds_weights(name: str, file: str, component: Component, there: Collection[str]) -> bool:
    if not component.weights:
        return False
    return file == component.weights or (
        is_shard(file, component.weights) and f"{name}/{component.weights}" not in there
    )
