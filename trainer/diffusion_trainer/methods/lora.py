"""Low-rank adapters by PEFT, with our own stateless initialisation and dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_trainer.methods.base import Attached, named_group
from diffusion_trainer.methods.conditioning import TextPath
from diffusion_trainer.methods.dropout import Masks, key_dropout
from diffusion_trainer.methods.text import clip_encoders, in_steps, published_name
from diffusion_trainer.models import Family
from diffusion_trainer.rng import Purpose, stream

ADAPTER = "default"
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_MARKS = {
    f".lora_A.{ADAPTER}.weight": DOWN,
    f".lora_B.{ADAPTER}.weight": UP,
    f".lora_magnitude_vector.{ADAPTER}.weight": MAGNITUDE,
}
_CLIP_ATTENTION = ["k_proj", "out_proj", "q_proj", "v_proj"]
_CLIP_FEED_FORWARD = ["fc1", "fc2"]


def attach_lora(family: Family, spec: TrainerSpec, *, seed: int) -> Attached:
    """Freeze the model and put adapters on linear layers of the denoiser, and of CLIP where the job trains it.

    Names are `<module path>.lora_A.weight` ([rank, in]), `.lora_B.weight` ([out, rank]) and, with DoRA,
    `.lora_magnitude_vector` ([out]); see `Attached` for paths. A is drawn from a stream of its own name, B is zero, so
    that the adapted model begins as the base model.
    """
    lora = spec.lora or LoRA()
    masks = Masks()
    targets = family.lora_target_modules(lora.targets)
    family.denoiser.requires_grad_(requires_grad=False)
    key_dropout(family.denoiser, masks)
    groups = [named_group(_adapters(family.denoiser, lora, targets, masks, family.device))]
    encoders: list[nn.Module] = []
    trains_text = spec.model.text_encoder.train
    if trains_text:
        groups.append(
            named_group(
                (
                    (f"{folder}.{published_name(path)}", parameter)
                    for folder, encoder in clip_encoders(family).items()
                    for path, parameter in _adapters(encoder, lora, clip_targets(lora), masks, family.device)
                ),
                lr_scale=spec.model.text_encoder.learning_rate / spec.learning_rate,
            )
        )
        encoders = in_steps(family)
    text = TextPath(family, live=trains_text)
    attached = Attached("Adapter", tuple(groups), (family.denoiser, *encoders), text, masks=masks)
    for name, parameter in attached.parameters.items():
        parameter.data = _initial(name, parameter, seed=seed)
    return attached


def clip_targets(lora: LoRA) -> list[str]:
    """Return the suffixes of the names of CLIP's linear layers that get an adapter."""
    return _CLIP_ATTENTION if lora.targets == "Attention" else sorted(_CLIP_ATTENTION + _CLIP_FEED_FORWARD)


def _adapters(
    module: nn.Module, lora: LoRA, targets: Sequence[str], masks: Masks, device: torch.device
) -> Iterator[tuple[str, nn.Parameter]]:
    """Put adapters on a module and yield their parameters by stable names."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(targets),
        init_lora_weights=True,
        use_dora=lora.use_dora,
    )
    module.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]):  # PEFT draws values that are replaced
        inject_adapter_in_model(config, module, ADAPTER)
    if lora.dropout:
        layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLayer)}
        for _, layer in sorted(layers.items()):
            layer.lora_dropout[ADAPTER] = masks.layer(lora.dropout)
    module.to(device)
    for path, parameter in module.named_parameters():
        for mark, suffix in _MARKS.items():
            if path.endswith(mark):
                yield path.removesuffix(mark) + suffix, parameter


def _initial(name: str, parameter: nn.Parameter, *, seed: int) -> Tensor:
    """Return fp32 values of one parameter: A uniform in +-1/sqrt(in), as PEFT draws it, B zero.

    The magnitude is what PEFT made it: the norms of the weight's rows, so that nothing changes at first.
    """
    if name.endswith(MAGNITUDE):
        return parameter.detach().float()
    if name.endswith(UP):
        return torch.zeros_like(parameter, dtype=torch.float32)
    bound = 1 / math.sqrt(parameter.shape[1])
    numbers = stream(seed, Purpose.INITIALISATION, name).random(tuple(parameter.shape), dtype=np.float32)
    return torch.from_numpy((numbers * 2 - 1) * np.float32(bound)).to(parameter.device)
