"""Results on their way to the user: exported files with their hashes, the model card, and the receipt.

The receipt lies beside the checkpoints. It is written last, so that an attempt that finds it has nothing left to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffusion_api.combinations import Kind
from diffusion_api.job import TrainerSpec
from diffusion_api.status import OutputFile
from diffusion_trainer.errors import NotFound
from diffusion_trainer.objectstore import ObjectStore

RECEIPT = "output.json"
CARD = "README.md"
MOST_TOLD = 8
"""Files that a last word has room for."""
_TAGS: dict[Kind, tuple[str, ...]] = {"Adapter": ("lora",), "Weights": (), "Embedding": ("textual_inversion",)}


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


@dataclass(frozen=True, slots=True)
class Results:
    """What was exported, and how the run ended in words; "" where it took all its steps and exported the last weights.

    `stopped_early_at` is the step after which it stopped before that.
    """

    files: tuple[OutputFile, ...]
    conclusion: str = ""
    stopped_early_at: int | None = None


def sign(state: ObjectStore, results: Results, *, identity: str) -> None:
    """Leave the receipt: everything is exported."""
    content = {
        "identity": identity,
        "files": [file.to_json_object() for file in results.files],
        "conclusion": results.conclusion,
        "stoppedEarlyAt": results.stopped_early_at,
    }
    state.put(RECEIPT, json.dumps(content, indent=1).encode())


def receipt(state: ObjectStore, output: ObjectStore, *, identity: str) -> Results | None:
    """Return the results of an earlier attempt that exported everything, None when a file is not there any more."""
    try:
        content = json.loads(state.get(RECEIPT))
        if content["identity"] != identity:
            return None
        files = tuple(OutputFile.model_validate(file) for file in content["files"])
        if any(output.head(file.name).size != file.bytes for file in files):
            return None
        return Results(files, content.get("conclusion", ""), content.get("stoppedEarlyAt"))
    except NotFound:
        return None


def condensed(files: tuple[OutputFile, ...]) -> tuple[OutputFile, ...]:
    """Return files as they are told of: where there are many, a folder of several as one entry, with a slash behind.

    Its hash is that of the lines `<sha256>  <name>` of its files, as sha256sum writes them from the destination.
    """
    if len(files) <= MOST_TOLD:
        return files
    folders: dict[str, list[OutputFile]] = {}
    for file in files:
        folder, slash, _ = file.name.partition("/")
        folders.setdefault(folder + slash, []).append(file)
    return tuple(members[0] if len(members) == 1 else _as_one(name, members) for name, members in folders.items())


def _as_one(folder: str, files: list[OutputFile]) -> OutputFile:
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in sorted(files, key=lambda file: file.name))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return OutputFile(name=folder, sha256=digest, bytes=sum(file.bytes for file in files))


def model_card(spec: TrainerSpec, *, family: str, images: int, steps: int) -> str:
    """Return the README of the results, in the hub's format."""
    tags = ["stable-diffusion", "text-to-image", *_TAGS[spec.trains], "diffusers-training"]
    if spec.method == "Unconditional":
        tags = ["unconditional-image-generation", "diffusers-training"]
    return f"""---
library_name: diffusers
tags: [{", ".join(tags)}]
---
# {spec.method} for {family}

Trained from `{spec.model.source}` on {images} images for {steps} steps: batch size {spec.batch_size}, peak learning
rate {spec.learning_rate:g} ({spec.training.lr_schedule.name}), seed {spec.training.seed}.

```python
{_usage(spec)}
```
"""


def _usage(spec: TrainerSpec) -> str:
    """Return the lines of Python that use what is in the folder diffusers/."""
    prompt = spec.validation.prompts[0].prompt if spec.validation.prompts else "a photo"
    if spec.method == "Unconditional":
        source, load, call = "diffusers", "", ""
    elif spec.trains == "Weights":
        source, load, call = "diffusers", "", repr(prompt)
    elif spec.trains == "Adapter":
        load = 'pipeline.load_lora_weights("diffusers/pytorch_lora_weights.safetensors")\n'
        source, call = "<base model>", repr(prompt)
    else:
        load = 'pipeline.load_textual_inversion("diffusers/learned_embeds.safetensors")\n'
        token = spec.textual_inversion.token if spec.textual_inversion else ""
        source = "<base model>"
        call = repr(prompt if token in prompt else f"a photo of {token}")
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{source}")\n{load}{_schedule(spec)}'
        f"image = pipeline({call}).images[0]"
    )


def _schedule(spec: TrainerSpec) -> str:
    """Return the lines that give a base model the noise schedule that an adapter or word was trained on."""
    objective = spec.training.objective
    if spec.trains == "Weights" or not objective.zero_terminal_snr:
        return ""
    predicted = {"VPrediction": "v_prediction", "Sample": "sample"}.get(objective.prediction_type)
    told = f', prediction_type="{predicted}"' if predicted else ""
    return (
        "from diffusers import DDIMScheduler\n\n"
        "pipeline.scheduler = DDIMScheduler.from_config(\n    pipeline.scheduler.config, rescale_betas_zero_snr=True, "
        f'timestep_spacing="trailing"{told}\n)\n'
    )
