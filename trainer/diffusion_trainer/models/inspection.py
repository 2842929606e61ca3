"""Look at a model's files before any library opens them: the list of what is allowed is short, and everything else out.

A model folder is input from strangers. Libraries turn strings of its JSON files into classes and modules to import, so
those strings are compared with a list first, whatever safeguards the libraries have of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_api.job import TrainerSpec
from diffusion_api.model import Family as FamilyName
from diffusion_api.model import Model
from diffusion_trainer.errors import BadConfig, BadData, InputMissing

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
_MAX_JSON_BYTES = 64 * 1024 * 1024
# Keys by which a configuration can name code, or libraries that load code or pickles.
_FORBIDDEN_KEYS = frozenset({"auto_map", "custom_pipelines", "quantization_config", "trust_remote_code"})
_PIPELINES: dict[str, FamilyName] = {
    "StableDiffusionPipeline": "SD1",
    "StableDiffusionXLPipeline": "SDXL",
    "StableDiffusion3Pipeline": "SD3",
    "DDPMPipeline": "UNet2D",
    "DDIMPipeline": "UNet2D",
}
_SD2_TEXT_WIDTH = 1024
INDEX_SUFFIX = ".index.json"
_SCHEDULERS = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a pipeline: the classes that it may name, its configuration and its weights ("" where it has none)."""

    classes: frozenset[str]
    config: str
    weights: str = ""

    @property
    def kind(self) -> str:
        """Return the class that loads it; of a tokenizer the name without `Fast`, which is of the same class."""
        return min(self.classes)


_FLOW_SCHEDULERS = frozenset({"FlowMatchEulerDiscreteScheduler"})
_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"


def _network(kind: str, weights: str = _DIFFUSERS) -> Component:
    return Component(frozenset({kind}), "config.json", weights)


def _tokenizer(kind: str) -> Component:
    return Component(frozenset({kind, f"{kind}Fast"}), "tokenizer_config.json")


_SD1 = {
    "unet": _network("UNet2DConditionModel"),
    "vae": _network("AutoencoderKL"),
    "text_encoder": _network("CLIPTextModel", _TRANSFORMERS),
    "tokenizer": _tokenizer("CLIPTokenizer"),
    "scheduler": Component(_SCHEDULERS, "scheduler_config.json"),
}
_SDXL = {
    **_SD1,
    "text_encoder_2": _network("CLIPTextModelWithProjection", _TRANSFORMERS),
    "tokenizer_2": _tokenizer("CLIPTokenizer"),
}
_SD3 = {
    "transformer": _network("SD3Transformer2DModel"),
    "vae": _network("AutoencoderKL"),
    "text_encoder": _network("CLIPTextModelWithProjection", _TRANSFORMERS),
    "text_encoder_2": _network("CLIPTextModelWithProjection", _TRANSFORMERS),
    "text_encoder_3": _network("T5EncoderModel", _TRANSFORMERS),
    "tokenizer": _tokenizer("CLIPTokenizer"),
    "tokenizer_2": _tokenizer("CLIPTokenizer"),
    "tokenizer_3": _tokenizer("T5Tokenizer"),
    "scheduler": Component(_FLOW_SCHEDULERS, "scheduler_config.json"),
}
_UNET2D = {"unet": _network("UNet2DModel"), "scheduler": Component(_SCHEDULERS, "scheduler_config.json")}
TRAINABLE: dict[FamilyName, dict[str, Component]] = {
    "SD1": _SD1,
    "SD2": _SD1,
    "SDXL": _SDXL,
    "SD3": _SD3,
    "UNet2D": _UNET2D,
}
"""Components of each family."""


def family_of(folder: Path) -> FamilyName:
    """Return the family of a model in diffusers layout, as its index and configurations say.

    Raises:
        InputMissing: there is no model_index.json.
        BadData: it names a pipeline that no family belongs to, or cannot be read.

    """
    index = read_json(folder / INDEX)
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in _PIPELINES:
        raise BadData(
            f"{folder.name}/{INDEX}: its _class_name is {found!r}, which is no family that can be trained; use a "
            f"text-to-image model of one of {', '.join(sorted(_PIPELINES))}"
        )
    family = _PIPELINES[found]
    return "SD2" if family == "SD1" and _is_sd2(read_json(folder / "unet" / "config.json")) else family


def _is_sd2(unet: Mapping[str, Any]) -> bool:
    """Return whether a UNet is SD2's: text of OpenCLIP's width, and linear projections around attention."""
    return unet.get("cross_attention_dim") == _SD2_TEXT_WIDTH or unet.get("use_linear_projection") is True


def trainable_family(folder: Path, model: Model) -> FamilyName:
    """Return the family of a model. Raises `BadData` when it is not the one asked for."""
    found = family_of(folder)
    if model.family not in {"Auto", found}:
        raise BadData(f"model.family is {model.family}, but {model.source} is {found}; use Auto, or another model")
    return found


def says_nothing(family: FamilyName, spec: TrainerSpec) -> bool:
    """Return whether the model does not say what its denoiser predicts, and the job has to."""
    return family == "SD2" and spec.model.source.endswith(".safetensors")


def check_fit(family: FamilyName, spec: TrainerSpec, *, predicts: str = "") -> None:
    """Raise `BadConfig` where the job asks for what a model of that family cannot do.

    `predicts` is what its noise scheduler says of the denoiser, where that has been looked at.
    """
    for path, value, reason in spec.misfits(family):
        raise BadConfig(f"{path}: {value}: {reason}" if path != "method" else f"method: {reason}")
    if says_nothing(family, spec) and spec.training.objective.prediction_type == "Auto":
        raise BadConfig(
            "training.objective.predictionType: Auto: model.source is a single file of SD2, which does not say what "
            "its denoiser predicts; use VPrediction for models of 768 px, Epsilon for those of 512 px (base)"
        )
    asked = spec.training.objective
    if asked.zero_terminal_snr and asked.prediction_type == "Auto" and predicts == "epsilon":
        raise BadConfig(
            "training.objective.zeroTerminalSNR is true, but the model predicts the noise, which says nothing of the "
            "image where all is noise; set predictionType: VPrediction as well"
        )


def check_files(folder: Path, components: Mapping[str, Component]) -> dict[str, Path]:
    """Return the weight files of a model after a look at all its files; keys are paths in the model's folder.

    Raises:
        InputMissing: a component, its configuration or its safetensors weights are missing.
        BadData: there is code in the folder, or a configuration names a class that is not on the list.

    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".py", ".pyc", ".so"}:
            raise BadData(f"model: {path.relative_to(folder)} is code, and code of models is never run; remove it")
    index = read_json(folder / INDEX)
    weights: dict[str, Path] = {}
    for name, component in components.items():
        _check_entry(name, component, index)
        config = folder / name / component.config
        _check_config(name, component, read_json(config), str(config.relative_to(folder)))
        if component.weights:
            weights |= _weights(folder, f"{name}/{component.weights}")
    for path in sorted(folder.rglob("*.json")):  # tokenizer.json, added_tokens.json, ... are read by libraries as well
        if path.relative_to(folder).parts[0] in {INDEX, *components}:
            refuse_forbidden(read_any_json(path), str(path.relative_to(folder)))
    return weights


def check_networks(folder: Path, family: FamilyName) -> None:
    """Raise `BadData` for a denoiser, or a VAE or text encoders beside it, that cannot be trained as the family's."""
    if family == "UNet2D":
        _check_unconditional(read_json(folder / "unet" / "config.json"))
        return
    component, channels = ("transformer", 16) if family == "SD3" else ("unet", 4)
    wanted = read_json(folder / component / "config.json").get("in_channels", channels)
    if wanted != channels:
        raise BadData(
            f"model: {component}/config.json has in_channels {wanted}, as inpainting models have; a text-to-image "
            f"model has {channels}: use that"
        )
    vae = read_json(folder / "vae" / "config.json")
    latents = vae.get("latent_channels", 4)
    if latents != channels:
        raise BadData(
            f"model: vae/config.json has latent_channels {latents}, but the denoiser takes {channels}; use the VAE "
            "that belongs to the family (model.vae)"
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise BadData(
            "model: vae/config.json has latents_mean and latents_std, as models have that were not trained on "
            "scaled latents alone; use another model, or another VAE (model.vae)"
        )
    if family != "SD3":
        _check_text(folder, [name for name in TRAINABLE[family] if name.startswith("text_encoder")])


def _check_unconditional(config: Mapping[str, Any]) -> None:
    wrong = {name: config[name] for name in ("in_channels", "out_channels") if config.get(name, 3) != 3}
    if wrong or config.get("class_embed_type") or config.get("num_class_embeds"):
        raise BadData(
            f"model: unet/config.json has {wrong or 'class embeddings'}; an unconditional model takes and gives "
            "three channels and nothing else: use one"
        )


def _check_entry(name: str, component: Component, index: Mapping[str, Any]) -> None:
    entry = index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or entry == [None, None]:
        raise InputMissing(f"model: {INDEX} has no component {name}; use a complete model in diffusers layout")
    library, found = entry
    if library not in {"diffusers", "transformers"} or found not in component.classes:
        raise BadData(
            f"model: {INDEX} gives {library}.{found} for {name}; allowed is {' or '.join(sorted(component.classes))}"
        )


def _check_text(folder: Path, texts: Sequence[str]) -> None:
    """Refuse text encoders whose text is not as wide as the UNet takes it; they may come from another place."""
    taken = read_json(folder / "unet" / "config.json").get("cross_attention_dim")
    widths = [read_json(folder / name / "config.json").get("hidden_size") for name in texts]
    given = sum(width for width in widths if isinstance(width, int))
    if isinstance(taken, int) and None not in widths and taken != given:
        raise BadData(
            f"model: the UNet takes text {taken} wide, and {' and '.join(texts)} give {given}; they belong to "
            "different models: use text encoders of the UNet's family (model.textEncoder.source)"
        )


def _check_config(name: str, component: Component, config: Mapping[str, Any], where: str) -> None:
    named = [config.get("_class_name"), config.get("tokenizer_class"), *_architectures(config)]
    for found in named:
        if found is not None and found not in component.classes:
            raise BadData(
                f"model: {where} names the class {found!r} for {name}; allowed is "
                f"{' or '.join(sorted(component.classes))}"
            )


def _architectures(config: Mapping[str, Any]) -> list[object]:
    found = config.get("architectures") or []
    return found if isinstance(found, list) else [found]


def refuse_forbidden(content: object, where: str) -> None:
    """Raise `BadData` where JSON has a key by which it could name code."""
    for key in _keys(content):
        if key in _FORBIDDEN_KEYS:
            raise BadData(
                f"model: {where} has the key {key!r}, by which a model can have code loaded; remove it, or use a model "
                "without it"
            )


def _keys(content: object) -> Iterator[str]:
    """Yield the keys of all objects in a JSON value, without recursion: depth is the stranger's choice."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _weights(folder: Path, relative: str) -> dict[str, Path]:
    """Return one file, or the shards of an index beside its place."""
    path, index = folder / relative, folder / f"{relative}{INDEX_SUFFIX}"
    if path.is_file():
        return {relative: path}
    if index.is_file():
        return _shards(index, stem=path.stem)
    others = sorted(p.name for p in path.parent.glob("*") if p.suffix in {".bin", ".ckpt", ".pt", ".safetensors"})
    there = f" (there is {', '.join(others)})" if others else ""
    raise InputMissing(
        f"model: {relative} is missing{there}; only safetensors of that "
        "name are loaded, because pickles run code: convert the model with "
        "`save_pretrained(..., safe_serialization=True)`"
    )


def _shards(index: Path, *, stem: str) -> dict[str, Path]:
    """Return the files that an index names. A name could lead out of the folder, so only shards' names may be there."""
    places = read_json(index).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    wrong = next((name for name in names if not is_shard(name, f"{stem}.safetensors")), None)
    if wrong is not None or not names:
        raise BadData(
            f"model: {index.parent.name}/{index.name} names {wrong or 'no file'!r}; allowed are files such as "
            f"{stem}-00001-of-00002.safetensors: replace it by the original file"
        )
    missing = next((name for name in names if not (index.parent / name).is_file()), None)
    if missing is not None:
        raise InputMissing(f"model: {index.parent.name}/{missing} is missing, which {index.name} names; add it")
    return {f"{index.parent.name}/{name}": index.parent / name for name in names}


def is_shard(name: str, weights: str) -> bool:
    """Return whether a file name is that of a part of a weight file."""
    stem = re.escape(weights.removesuffix(".safetensors"))
    return re.fullmatch(stem + r"-\d{5}-of-\d{5}\.safetensors", name) is not None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises `InputMissing` and `BadData`."""
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise BadData(f"model: {path.parent.name}/{path.name} holds no JSON object; replace it by the original file")
    return content


def read_any_json(path: Path) -> object:
    """Return a JSON value. Raises `InputMissing` and `BadData`."""
    where = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise InputMissing(f"model: {where} is missing; model.source must be a folder in diffusers layout, complete")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise BadData(
            f"model: {where} is larger than {_MAX_JSON_BYTES // 1024**2} MiB; replace it by the original file"
        )
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadData(f"model: {where} is no valid JSON ({error}); replace it by the original file") from error
