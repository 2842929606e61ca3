"""The files of a CLIP model in transformers' layout, looked at before any library opens them. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from diffusion_trainer.errors import BadConfig, BadData, InputMissing
from diffusion_trainer.models.fetching import fetch_files
from diffusion_trainer.models.inspection import is_shard, read_any_json, read_json, refuse_forbidden
from diffusion_trainer.models.sources import Source
from diffusion_trainer.objectstore.base import ObjectInfo

FIELD = "validation.scores.model"
CONFIG, PICTURES, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
_INDEX = f"{WEIGHTS}.index.json"
_TOKENIZERS = (frozenset({"tokenizer.json"}), frozenset({"vocab.json", "merges.txt"}))
"""Either of them is a whole tokenizer."""
_SMALL = frozenset().union(*_TOKENIZERS) | {
    CONFIG, PICTURES, _INDEX, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
}  # fmt: skip


def check_library() -> None:
    """Raise `BadConfig` where this trainer cannot compute scores."""
    if find_spec("torchmetrics") is None:
        raise BadConfig(
            "validation.scores is set, for which this trainer lacks torchmetrics; leave it out, or use an image with "
            "diffusion-operator[trainer,metrics]"
        )


def fetch_clip(source: Source, work: Path, *, weights: bool = True) -> Path:
    """Download the files that loading reads and return their folder below `work`; without `weights`, JSON only.

    Raises:
        InputMissing: a file is missing.
        BadData: it is another model than CLIP, or a configuration names code.

    """
    wanted = _wanted(source)
    if not weights:
        wanted = {key: info for key, info in wanted.items() if key.endswith(".json")}
    folder = fetch_files(source, wanted, work / "clip")
    found = read_json(folder / CONFIG).get("model_type")
    if found != "clip":
        raise BadData(f"{FIELD} {source.uri}{CONFIG} has model_type {found!r}; use a CLIP model, whose is 'clip'")
    for path in sorted(folder.glob("*.json")):
        refuse_forbidden(read_any_json(path), f"{FIELD}: {path.name}")
    return folder


def _wanted(source: Source) -> dict[str, ObjectInfo]:
    found = {info.key: info for info in source.list()}
    for name in (CONFIG, PICTURES):
        if name not in found:
            raise InputMissing(
                f"{FIELD} {source.uri} has no {name}; give the folder of a CLIP model as transformers writes it"
            )
    if not any(files <= found.keys() for files in _TOKENIZERS):
        raise InputMissing(f"{FIELD} {source.uri} has no tokenizer: add tokenizer.json, or vocab.json and merges.txt")
    weights = _weights(found)
    if not weights:
        raise InputMissing(
            f"{FIELD} {source.uri} has no {WEIGHTS}; only safetensors are loaded, because pickles run code: convert "
            "the model with `save_pretrained(...)`"
        )
    return {key: info for key, info in found.items() if key in _SMALL or key in weights}


def _weights(found: Collection[str]) -> set[str]:
    if WEIGHTS in found:
        return {WEIGHTS}
    return {key for key in found if is_shard(key, WEIGHTS)} if _INDEX in found else set()
