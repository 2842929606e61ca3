"""Adapters as kohya's sd-scripts, AUTOMATIC1111, Forge and ComfyUI load them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_trainer import tensorfile
from diffusion_trainer.export.adapter_names import kohya_denoiser, kohya_text, modules
from diffusion_trainer.export.components import by_component, denoiser_folder, published
from diffusion_trainer.export.kohya_mmdit import Adapter, kohya_mmdit
from diffusion_trainer.export.single_file import architecture
from diffusion_trainer.methods.lora import DOWN, MAGNITUDE, UP
from diffusion_trainer.models.base import Family
from diffusion_trainer.objective import DiscreteProcess

FILE = "lora.safetensors"
_PREDICTIONS = {"Epsilon": "epsilon", "VPrediction": "v", "Sample": "sample"}
_DORA = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
_BASES = {"SD1": "sd_v1", "SD2": "sd_v2", "SDXL": "sdxl_base_v1-0", "SD3": "sd3_m"}
_LEGACY_OFFSET, _LEGACY_LENGTH = 0x100000, 0x10000


def export_kohya(weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec, *, folder: Path) -> list[Path]:
    """Write `lora.safetensors` into `folder` and return the files written.

    `weights` as for `export_diffusers`. Three tensors for each module: lora_down, lora_up and alpha, the configured
    one; readers scale by alpha / rank. With DoRA a fourth, dora_scale [out, 1], as ComfyUI reads it.
    """
    lora = spec.lora or LoRA()
    tensors: dict[str, Tensor] = {}
    for name, (down, up, magnitude, factor) in _adapters(weights, family).items():
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(float(lora.alpha) * factor)
        if magnitude is not None:
            tensors[f"{name}.dora_scale"] = magnitude[:, None]
    training = _training_metadata(lora, family, spec)
    metadata = training | _model_spec(family, spec) | _hashes(tensors, training)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    tensorfile.write(path, tensors, metadata)
    return [path]


def _adapters(weights: Mapping[str, Tensor], family: Family) -> dict[str, Adapter]:
    """Return adapters by kohya's names, of the denoiser and of text encoders."""
    found: dict[str, Adapter] = {}
    for component, adapters in by_component(weights, family).items():
        paths = modules(adapters)
        parts = {path: _parts(adapters, path) for path in paths}
        if component != denoiser_folder(family):
            found |= {kohya_text(component, path, family.name): parts[path] for path in paths}
        elif family.name == "SD3":
            found |= kohya_mmdit(parts)
        else:
            names = kohya_denoiser(paths, published(family, component), family.name)
            found |= {names[path]: parts[path] for path in paths}
    return found


def _parts(adapters: Mapping[str, Tensor], path: str) -> Adapter:
    return Adapter(adapters[path + DOWN], adapters[path + UP], adapters.get(path + MAGNITUDE))


def _training_metadata(lora: LoRA, family: Family, spec: TrainerSpec) -> dict[str, str]:
    """Return what kohya's trainer writes (sd-scripts, train_network.py) as far as it is a function of the spec.

    Every value is a string; what is no string in Python is JSON, as there.
    """
    dataset, training = spec.dataset, spec.training
    resolution = f"({dataset.resolution}, {dataset.resolution})"
    module = "networks.lora_sd3" if family.name == "SD3" else "networks.lora"
    module = "lycoris.kohya" if lora.use_dora else module  # kohya's own network has no magnitudes
    base = next(digest for path, digest in family.file_hashes().items() if path.startswith(denoiser_folder(family)))
    gamma = training.objective.snr_gamma if isinstance(family.process, DiscreteProcess) else None
    text_rate = str(spec.model.text_encoder.learning_rate) if spec.model.text_encoder.train else "None"
    return {
        "ss_v2": str(family.name == "SD2"),
        "ss_base_model_version": _BASES[family.name],
        "ss_network_module": module,
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(float(lora.alpha)),
        "ss_network_dropout": str(lora.dropout),
        "ss_network_args": json.dumps(_DORA if lora.use_dora else {}),
        "ss_unet_lr": str(spec.learning_rate),
        "ss_text_encoder_lr": text_rate,
        "ss_learning_rate": str(spec.learning_rate),
        "ss_lr_scheduler": training.lr_schedule.name.lower(),
        "ss_lr_warmup_steps": str(training.lr_schedule.warmup_steps),
        "ss_optimizer": training.optimizer.name,
        "ss_max_grad_norm": str(training.optimizer.max_grad_norm),
        "ss_total_batch_size": str(spec.batch_size),
        "ss_seed": str(training.seed),
        "ss_resolution": resolution,
        "ss_enable_bucket": str(dataset.buckets.enabled),
        "ss_bucket_info": json.dumps(None),
        "ss_tag_frequency": "{}",
        "ss_clip_skip": "None",
        "ss_caption_dropout_rate": str(dataset.captions.dropout),
        "ss_noise_offset": str(training.objective.noise_offset or None),
        "ss_min_snr_gamma": str(gamma),
        "ss_mixed_precision": training.mixed_precision.lower(),
        "ss_new_sd_model_hash": base,
    }


def _model_spec(family: Family, spec: TrainerSpec) -> dict[str, str]:
    """Return the SAI model specification 1.0.1, without its date: equal weights give equal files."""
    process = family.process
    prediction = _PREDICTIONS[process.prediction_type] if isinstance(process, DiscreteProcess) else "flow"
    resolution = spec.dataset.resolution
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture(family)}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "LoRA",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": prediction,
    }


def _hashes(tensors: Mapping[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes by which AUTOMATIC1111 knows the file: of the data without header, and of 64 KiB at 1 MiB.

    The second is of the file as it would be with the training metadata alone (sd-scripts,
    `precalculate_safetensors_hashes`).
    """
    content = tensorfile.encode(tensors, training)
    data = content[8 + int.from_bytes(content[:8], "little") :]
    whole = hashlib.sha256(data).hexdigest()
    legacy = hashlib.sha256(content[_LEGACY_OFFSET : _LEGACY_OFFSET + _LEGACY_LENGTH]).hexdigest()[:8]
    return {"sshs_model_hash": whole, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{whole}"}
