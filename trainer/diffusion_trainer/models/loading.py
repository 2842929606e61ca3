"""Components of a model in diffusers layout, loaded by the libraries and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffusion_trainer.errors import BadData
from diffusion_trainer.models.inspection import read_json
from diffusion_trainer.objective import DiscreteProcess, FlowProcess, Prediction

TIMESTEPS = 1000
_MOST_SHIFT = 100
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "Epsilon", "v_prediction": "VPrediction", "sample": "Sample"}
# What of a noise scheduler's configuration decides the forward process; the rest is about sampling.
_FORWARD_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def loaded(kind: Any, folder: Path, **how: Any) -> Any:
    """Load one component, and refuse it when the library had to make up weights of its own (it only logs that)."""
    try:
        found, report = kind.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise BadData(f"model: {folder.name} cannot be loaded ({error}); replace it by the original files") from error
    wrong = sorted(report["missing_keys"]) + sorted(str(entry) for entry in report.get("mismatched_keys", ()))
    if wrong:
        raise BadData(
            f"model: {len(wrong)} weights of {folder.name} are missing or of another shape than config.json says, "
            f"e.g. {wrong[0]}; replace the folder by the original files"
        )
    return found


def load_text_encoder(kind: Any, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Load one of transformers' encoders, frozen."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a pod's log is no terminal
    return frozen(loaded(kind, folder, dtype=dtype, trust_remote_code=False))


def load_tokenizer(kind: Any, folder: Path, encoder: Any) -> Any:
    """Load the tokenizer of an encoder."""
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise BadData(f"model: {folder.name} cannot be loaded ({error}); replace it by the original files") from error
    if len(tokenizer) > encoder.config.vocab_size:
        raise BadData(
            f"model: the {folder.name} has {len(tokenizer)} words and the text encoder {encoder.config.vocab_size}; "
            "they belong to different models: use the tokenizer that came with the text encoder"
        )
    return tokenizer


def load_discrete_process(folder: Path) -> DiscreteProcess:
    """Return the forward process that a noise scheduler's configuration describes."""
    from diffusers import DDPMScheduler

    config = read_json(folder / "scheduler" / "scheduler_config.json")
    prediction = config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", TIMESTEPS)
    if prediction not in _PREDICTIONS or steps != TIMESTEPS:
        raise BadData(
            f"model: scheduler/scheduler_config.json has prediction_type {prediction!r} and num_train_timesteps "
            f"{steps}; allowed are {', '.join(_PREDICTIONS)} and {TIMESTEPS}"
        )
    try:
        scheduler = DDPMScheduler(**{key: config[key] for key in _FORWARD_PROCESS if config.get(key) is not None})
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BadData(f"model: scheduler/scheduler_config.json cannot be used ({error}); replace it") from error
    return DiscreteProcess(scheduler.alphas_cumprod, _PREDICTIONS[prediction], config)


def load_flow_process(folder: Path) -> FlowProcess:
    """Return the flow that a scheduler's configuration describes."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    shift, steps = config.get("shift", 1.0), config.get("num_train_timesteps", TIMESTEPS)
    dynamic = config.get("use_dynamic_shifting", False)
    if steps != TIMESTEPS or dynamic or not isinstance(shift, int | float) or not 0 < shift <= _MOST_SHIFT:
        raise BadData(
            f"model: scheduler/scheduler_config.json has num_train_timesteps {steps}, shift {shift} and "
            f"use_dynamic_shifting {dynamic}; allowed are {TIMESTEPS}, up to {_MOST_SHIFT} and false"
        )
    return FlowProcess(float(shift), config)


def release(encoder: Any) -> None:
    """Move an encoder to the CPU; one that is trained stays where its optimizer expects it."""
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        encoder.to("cpu")


def frozen(module: Any) -> Any:
    """Return a module that is not trained."""
    return module.requires_grad_(False).eval()
