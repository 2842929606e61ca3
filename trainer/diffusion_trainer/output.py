"""Results on their way to the user: exported files with their hashes, the model card, and the receipt.

The receipt lies beside the checkpoints. It is written last, so that an attempt that finds it has nothing left to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from diffusion_api.job import TrainerSpec
from diffusion_api.status import OutputFile
from diffusion_trainer.errors import NotFound
from diffusion_trainer.objectstore import ObjectStore

RECEIPT = "output.json"
CARD = "README.md"


def upload(store: ObjectStore, folder: Path, files: Iterable[Path]) -> tuple[OutputFile, ...]:
    """Upload files below `folder` to the same places of the store and return what they are, in their order."""
    done = []
    for path in files:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        done.append(OutputFile(name=name, sha256=digest, bytes=path.stat().st_size))
        store.put_file(name, path)
    return tuple(done)


def sign(state: ObjectStore, files: tuple[OutputFile, ...], *, identity: str) -> None:
    """Leave the receipt: everything is exported."""
    content = {"identity": identity, "files": [file.to_json_object() for file in files]}
    state.put(RECEIPT, json.dumps(content, indent=1).encode())


def receipt(state: ObjectStore, output: ObjectStore, *, identity: str) -> tuple[OutputFile, ...] | None:
    """Return the files of an earlier attempt that exported everything, None when one of them is not there any more."""
    try:
        content = json.loads(state.get(RECEIPT))
        if content["identity"] != identity:
            return None
        files = tuple(OutputFile.model_validate(file) for file in content["files"])
        return files if all(output.head(file.name).size == file.bytes for file in files) else None
    except NotFound:
        return None


def model_card(spec: TrainerSpec, *, family: str, images: int, steps: int) -> str:
    """Return the README of the results, in the hub's format."""
    prompt = spec.validation.prompts[0].prompt if spec.validation.prompts else "a photo"
    return f"""---
library_name: diffusers
tags: [stable-diffusion, text-to-image, lora, diffusers-training]
---
# {spec.method} for {family}

Trained from `{spec.model.source}` on {images} images for {steps} steps: batch size {spec.batch_size}, peak learning
rate {spec.learning_rate:g} ({spec.training.lr_schedule.name}), seed {spec.training.seed}.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("<base model>")
pipeline.load_lora_weights("diffusers/pytorch_lora_weights.safetensors")
image = pipeline({prompt!r}).images[0]
```
"""
