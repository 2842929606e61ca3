"""Checkpoints in one file: a run on one, and text encoders with the words that the reader of such files knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion_api.run import RunConfig
from diffusion_trainer.models import fetch_model, open_model
from diffusion_trainer.models.base import Family
from diffusion_trainer.stores import open_stores
from testkit.tiny import text_config

GROUPS = {"norm_num_groups": 32}
"""As wide as the published ones', which cannot be read from a file."""


def words(width: int, **changes: Any) -> Any:
    """Return the configuration of a small CLIP with the published vocabulary and heads of 64."""
    ids = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    return text_config(width, **ids, num_attention_heads=width // 64, **changes)


def run_of(source: Path, family: str = "SD1", **sections: Any) -> RunConfig:
    """Return a run that trains a model, folder or file, as a whole; `sections` take the place of those of the spec."""
    prediction = {"objective": {"predictionType": "Epsilon"}} if family == "SD2" else {}
    return RunConfig.model_validate(
        {
            "job": {"name": "a", "namespace": "b", "uid": "c"},
            "attempt": 1,
            "device": "CPU",
            "spec": {
                "method": "FineTune",
                "model": {"source": source.as_uri()},
                "dataset": {"source": source.parent.as_uri(), "resolution": 64},
                "training": {"maxSteps": 1, **prediction},
                "output": {"destination": source.parent.as_uri(), "formats": ["SingleFile"]},
                **sections,
            },
        }
    )


def opened(source: Path, work: Path, family: str = "SD1", **model: str | dict[str, str]) -> Family:
    """Return the model, fetched below `work`; `model` are further fields of that section."""
    run = run_of(source, family, model={"source": source.as_uri(), **model})
    folder = fetch_model(open_stores(run, credentials=work).model, work, report=lambda _: None)
    return open_model(folder, run.spec, device="cpu", dtype=torch.float32)
