"""Micro-batches by trial, recomputation by estimate, and attention that is not there."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_api.memory_reference import spec_of
from diffusion_trainer import fitting
from diffusion_trainer.errors import BadConfig

SDXL = {
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "layers_per_block": 2,
    "in_channels": 4,
}


@pytest.mark.parametrize(
    ("share", "start", "limit", "tried", "size"),
    [
        (16, 16, 99, [16], 16),
        (16, 16, 5, [16, 8, 4], 4),
        (12, 12, 2, [12, 6, 3, 1], 1),  # divisors only
        (12, 5, 99, [4], 4),
        (7, 7, 6, [7, 1], 1),
        (4, 4, 0, [4, 2, 1], 0),
    ],
)
def test_micro_batches_are_tried_from_the_largest(share, start, limit, tried, size):
    seen = []

    def fits(images):
        seen.append(images)
        return images <= limit

    assert fitting.largest_that_fits(share, start, fits) == size
    assert seen == tried


def test_only_the_lack_of_memory_does_not_fit():
    def fail(error):
        raise error

    assert fitting.fits(lambda: None)
    assert not fitting.fits(lambda: fail(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="shapes"):
        fitting.fits(lambda: fail(RuntimeError("shapes do not match")))


@pytest.mark.parametrize(
    ("asked", "method", "config", "micro_batch", "memory", "recomputed"),
    [
        ("Auto", "LoRA", SDXL, 1, 80, False),
        ("Auto", "LoRA", SDXL, 1, 12, True),  # 13.0 GiB published without, 6.5 with (docs/reference/memory.md)
        ("Auto", "LoRA", SDXL, 16, 80, True),
        ("Auto", "LoRA", SDXL, 1, None, False),
        ("Auto", "LoRA", {"block_out_channels": [8]}, 1, 1, False),
        ("Always", "LoRA", SDXL, 1, 80, True),
        ("Never", "FineTune", SDXL, 1, 8, False),
    ],
)
def test_activations_are_recomputed_where_they_would_not_fit(asked, method, config, micro_batch, memory, recomputed):
    spec = spec_of(method, 1024, gradientCheckpointing=asked)
    assert fitting.recomputes(spec, config, micro_batch=micro_batch, memory_gib=memory) == recomputed


@pytest.mark.parametrize(("device", "text"), [("cpu", "for CUDA"), ("cuda", r"lacks; use SDPA.*\[trainer,cuda\]")])
def test_xformers_that_cannot_be_used_is_refused_with_a_remedy(monkeypatch, device, text):
    monkeypatch.setattr(fitting.importlib.util, "find_spec", lambda _: None)
    denoiser = SimpleNamespace()  # has nothing to call
    with pytest.raises(BadConfig, match=rf"training.attention is XFormers.*{text}"):
        fitting.set_attention(denoiser, "XFormers", device=torch.device(device))
    fitting.set_attention(denoiser, "Auto", device=torch.device(device))


def test_xformers_is_switched_on_where_it_is_there(monkeypatch):
    monkeypatch.setattr(fitting.importlib.util, "find_spec", lambda name: name)
    calls = []
    denoiser = SimpleNamespace(enable_xformers_memory_efficient_attention=lambda: calls.append("on"))
    fitting.set_attention(denoiser, "XFormers", device=torch.device("cuda"))
    assert calls == ["on"]
