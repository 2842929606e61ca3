"""Micro-batches by trial, recomputation by estimate, and attention that is not there."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion_api.memory_reference import spec_of
from diffusion_api.memory_table import ACTIVATIONS
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


CUBLAS_FULL = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
CUBLAS_NOT_THERE = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
NO_ENGINE = "FIND was unable to find an engine to execute this computation"


@pytest.mark.parametrize(
    ("text", "roomy", "full"),
    [
        (CUBLAS_FULL, True, True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True, True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True, True),
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", True, True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True, True),
        ("NCCL error ... Last error:\nCuda failure 2 'out of memory'", True, True),
        (CUBLAS_NOT_THERE, False, True),  # also what a broken GPU says
        (NO_ENGINE, False, True),  # also of what cuDNN cannot compute at all
        ("CUDA error: an illegal memory access was encountered", False, False),
        ("CUDA error: uncorrectable ECC error encountered", False, False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`", False, False),
        ("shapes do not match", False, False),
    ],
)
def test_shortage_of_memory_has_many_names(monkeypatch, text, roomy, full):
    for state, wanted in ((False, roomy), (True, full)):
        monkeypatch.setattr(fitting, "_gpu_is_full", lambda state=state: state)
        assert fitting.is_shortage(RuntimeError(text)) == wanted


def test_only_errors_of_the_device_are_shortages():
    assert fitting.is_shortage(torch.OutOfMemoryError("whatever it says"))
    assert not fitting.is_shortage(ValueError("CUDA out of memory"))
    assert not fitting.is_shortage(MemoryError())


@pytest.mark.parametrize(
    ("there", "free", "failed", "full"),
    [
        (True, 10 * 2**30, 0, False),
        (True, 10 * 2**20, 0, True),
        (True, 10 * 2**30, 1, True),  # cuDNN tries one workspace after another, and tells of none
        (True, None, 0, False),  # it does not even answer that
        (False, 0, 1, False),
    ],
)
def test_a_gpu_is_full_where_it_says_so(monkeypatch, there, free, failed, full):
    def mem_get_info():
        if free is None:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return free, 24 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": failed})
    assert fitting._gpu_is_full() == full


def test_what_is_computed_of_all_weights_at_once_needs_less_than_the_activations_that_are_gone_by_then():
    for name, line in ACTIVATIONS.items():
        if "/Denoiser/" in name and not name.startswith("UNet2D"):
            assert line.fixed + line.per_image + line.per_latent * 64 * 64 > fitting.PART_BYTES, name


def test_every_name_of_shortage_does_not_fit():
    def fail():
        raise RuntimeError(CUBLAS_FULL)

    assert not fitting.fits(fail)


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
    denoiser = nn.Linear(1, 1)
    denoiser.enable_xformers_memory_efficient_attention = lambda: calls.append("on")
    fitting.set_attention(denoiser, "XFormers", device=torch.device("cuda"))
    assert calls == ["on"]


def strict_attention(query, key, value, *, attn_bias, op, scale):
    """As xFormers' does: `fmha/common.py`, `Inputs.validate_inputs`."""
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError("Query/Key/Value should either all have the same dtype")
    assert (attn_bias, op) == (None, None)
    weights = (query.float() @ key.float().transpose(-1, -2) * scale).softmax(-1)
    return (weights @ value.float()).to(value.dtype)


def sd35():
    """The attention of a block of SD3.5, over pictures and text: queries and keys of both are normed."""
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    torch.manual_seed(0)
    attention = Attention(
        16, heads=2, dim_head=8, added_kv_proj_dim=16, bias=True, qk_norm="rms_norm", eps=1e-6,
        context_pre_only=False, processor=JointAttnProcessor2_0(),
    )  # fmt: skip
    return nn.ModuleDict({"attn": attention})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_xformers_gets_queries_and_keys_in_the_precision_of_values(monkeypatch, dtype):
    """Trained weights are fp32, and diffusers' RMSNorm answers in the precision of its weights."""
    from diffusers.models import attention_processor

    denoiser = sd35()
    xformers = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=strict_attention))
    monkeypatch.setattr(attention_processor, "xformers", xformers)

    def predicted():
        pictures, text = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return torch.cat(denoiser["attn"](pictures, encoder_hidden_states=text), 1).float()

    def enable():
        denoiser["attn"].set_processor(attention_processor.XFormersJointAttnProcessor())

    wanted = predicted()  # by torch's own attention, to which autocast gives one precision
    enable()
    if dtype == torch.bfloat16:
        with pytest.raises(ValueError, match="all have the same dtype"):
            predicted()
    denoiser.enable_xformers_memory_efficient_attention = enable
    monkeypatch.setattr(fitting.importlib.util, "find_spec", lambda name: name)
    fitting.set_attention(denoiser, "XFormers", device=torch.device("cuda"))
    found = predicted()
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-5)
    found.sum().backward()
    assert denoiser["attn"].norm_q.weight.grad.isfinite().all()
