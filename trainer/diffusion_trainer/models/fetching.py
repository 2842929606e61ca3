"""A model's files on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusion_trainer.objectstore import ObjectStore


def fetch_model(source: ObjectStore, work: Path, *, report: Callable[[str], None]) -> Path:
    """Download the files that loading needs (JSON, tokenizer, safetensors) and return their folder below `work`.

    Raises:
        InputMissing: there is no model_index.json at the source, or no safetensors weights of a component.
        BadData: the source contains Python files.

    """
    raise NotImplementedError
