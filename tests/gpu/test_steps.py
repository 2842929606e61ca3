"""Real steps on networks of random weights: nobody waits for the device, and memory is what was estimated."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusion_api.memory import CONTEXT_GIB, GIB, estimate
from diffusion_api.memory_reference import spec_of
from diffusion_trainer.data import Batch, Share
from diffusion_trainer.device import open_device
from diffusion_trainer.fitting import set_attention
from diffusion_trainer.methods import attach
from diffusion_trainer.models.sd1 import StableDiffusion1
from diffusion_trainer.models.sdxl import StableDiffusionXL
from diffusion_trainer.objective import DiscreteProcess, objective_of
from diffusion_trainer.optim import Group, apply_update, make_optimizer
from diffusion_trainer.peers import Peers
from diffusion_trainer.preparation import Ready
from diffusion_trainer.reporting import Extent
from diffusion_trainer.state import made_trainable
from diffusion_trainer.stepping import Stepper
from testkit import architectures
from testkit.tiny import UNET

FAMILIES = {"SD1": StableDiffusion1, "SDXL": StableDiffusionXL}


def tiny():
    return UNet2DConditionModel(**UNET)


def with_random_weights(network, *, device, dtype):
    """Fill a network of the meta device in its final dtype, so that nothing larger is ever there."""
    network = network.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, weight in network.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name and weight.ndim == 1), std=0.02)
    return network


def ready_on(device, spec, *, family="SD1", network=tiny, micro_batch=2):
    """Return what is there before the first step of a job with a denoiser alone, adapters or all of it trained."""
    opened = open_device(SimpleNamespace(device=device, spec=spec))
    model = object.__new__(FAMILIES[family])
    model.device, model.dtype, model.text_encoders = opened.torch, opened.dtype, {}
    with torch.device("meta"):
        empty = network()
    dtype = torch.float32 if spec.trains == "Weights" else opened.dtype
    model.denoiser = with_random_weights(empty, device=opened.torch, dtype=dtype)
    model.process = DiscreteProcess(torch.linspace(0.999, 0.005, 1000), "epsilon", {})
    attached = attach(model, spec, seed=1)
    attached.train()
    trained = made_trainable(attached.groups, spec.training, device=opened)
    objective = objective_of(model.process, spec.training.objective).to(opened.torch)
    extent, share = Extent(100, 100, spec.batch_size), Share(micro_batch)
    return Ready(opened, model, None, None, extent, share, objective, attached, trained, None)


def batch_of(count, *, pixels, width, pooled=0):
    """Return a micro-batch of noise in page-locked memory, as the loader makes it where there is a GPU."""
    numbers = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, count, 4, pixels // 8, pixels // 8, generator=numbers)
    text = {"text": torch.randn(count, 77, width, generator=numbers)}
    if pooled:
        text["pooled"] = torch.randn(count, pooled, generator=numbers)
    geometry = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * count, dtype=torch.float32)
    batch = Batch(latents, noise, torch.arange(count) * 90 + 10, text, geometry, torch.ones(count))
    return batch.pin_memory() if torch.cuda.is_available() else batch


def stepper_of(ready, spec):
    return Stepper(spec, ready, peers=Peers(), tell=lambda *_: None)


def moments_of(ready):
    return {name: parameter.detach().clone() for name, parameter in ready.trained.parameters.items()}


@contextmanager
def waits_refused(device):
    """Make torch raise where the host would wait for the GPU; the CPU is waited for always."""
    if device == "CPU":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["BF16", "FP16"])
def test_no_step_waits_for_the_device(device, precision):
    spec = spec_of("LoRA", 64, batchSize=2, maxSteps=100, mixedPrecision=precision, learningRate=1e-2)
    ready = ready_on(device, spec)
    stepper, batches = stepper_of(ready, spec), [batch_of(2, pixels=64, width=32)]
    stepper.take(batches, 0)  # libraries are loaded, algorithms are searched
    before = moments_of(ready)
    with waits_refused(device):
        taken = [stepper.take(batches, step) for step in range(1, 5)]
        if device == "CUDA":
            with pytest.raises(RuntimeError, match="synchronizing"):
                taken[-1].loss.item()
    losses = [step.loss.item() for step in taken]
    assert losses == sorted(losses, reverse=True)  # the same images and noise each time: it learns them
    assert all(not torch.equal(before[name], weight) for name, weight in ready.trained.parameters.items())


@pytest.mark.parametrize(("name", "tolerance"), [("AdamW", 1e-6), ("AdamW8bit", 0.01)])
def test_steps_of_optimizers_are_those_of_adamw_in_fp64(device, name, tolerance):
    """As `unit/trainer/test_optim.py` has it, where the kernels run that a job uses."""
    start = torch.randn(3, 1400, generator=torch.Generator().manual_seed(0))
    ours = torch.nn.Parameter(start.clone().to(device.lower()))
    exact = torch.nn.Parameter(start.double())
    settings = spec_of("LoRA", 512, optimizer={"name": name, "weightDecay": 0.1}).training.optimizer
    optimizer = make_optimizer([Group({"a": ours})], settings)
    reference = torch.optim.AdamW([exact], lr=0.01, weight_decay=0.1, foreach=False, fused=False)
    for step in range(5):
        for parameter in (ours, exact):
            (parameter * (step + 1) - 0.5).square().sum().backward()
        loss = torch.ones((), device=ours.device)
        update = apply_update(optimizer, learning_rate=0.01, max_grad_norm=None, loss=loss)
        reference.step()
        reference.zero_grad()
        assert not update.skipped
    torch.testing.assert_close(ours.detach().cpu().double(), exact.detach(), atol=tolerance, rtol=1e-5)
    assert (ours.detach().cpu() - start).abs().max() > 0.03
    ours.grad = torch.full_like(ours, torch.inf)
    before = ours.detach().clone()
    assert apply_update(optimizer, learning_rate=0.01, max_grad_norm=None, loss=loss).skipped
    assert torch.equal(before, ours)


@pytest.mark.parametrize(("family", "pixels"), [("SD1", 512), ("SDXL", 1024)])
def test_memory_of_adapters_is_what_was_estimated(device, family, pixels):
    """Of published size; without a GPU nothing counts memory, and a small picture shows that such steps are taken."""
    pixels = pixels if device == "CUDA" else 64
    spec = spec_of("LoRA", pixels, batchSize=1, maxSteps=100, mixedPrecision="BF16")
    if device == "CUDA":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ready = ready_on(device, spec, family=family, network=lambda: architectures.denoiser(family), micro_batch=1)
    width, pooled = architectures.TEXT_WIDTHS[family], 1280 if family == "SDXL" else 0
    stepper, batches = stepper_of(ready, spec), [batch_of(1, pixels=pixels, width=width, pooled=pooled)]
    taken = [stepper.take(batches, step) for step in range(2)]
    assert all(step.loss.isfinite() and step.norm > 0 for step in taken)
    if device == "CUDA":
        found = torch.cuda.max_memory_reserved() / GIB + CONTEXT_GIB
        estimated = estimate(spec, family=family, micro_batch=1).moments["Training"]
        assert 0.6 * estimated < found <= estimated, f"{found:.2f} GiB, estimated were {estimated:.2f}"
    del ready, stepper
    gc.collect()


@pytest.mark.gpu
def test_micro_batches_are_halved_until_they_fit(cuda):
    spec = spec_of("LoRA", 1024, batchSize=16, maxSteps=100, mixedPrecision="BF16")
    batches = [batch_of(16, pixels=1024, width=32)]

    def taken(micro_batch):
        stepper = stepper_of(ready_on("CUDA", spec, micro_batch=micro_batch), spec)
        return stepper.take(batches, 0).loss.item(), stepper.micro_batch_size

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    wanted, _ = taken(4)
    enough = torch.cuda.max_memory_reserved() * 1.2
    gc.collect()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(enough / torch.cuda.get_device_properties(cuda).total_memory)
        found, size = taken(16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert size in {2, 4}
    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.gpu
def test_xformers_computes_what_torch_does(cuda):
    pytest.importorskip("xformers", reason="the extra `cuda` is not installed")
    spec = spec_of("LoRA", 64, batchSize=2, maxSteps=100, mixedPrecision="BF16")
    batch, found = batch_of(2, pixels=64, width=32).to(cuda), []
    ready = ready_on("CUDA", spec)
    for asked in ("SDPA", "XFormers"):
        set_attention(ready.family.denoiser, asked, device=cuda)
        with torch.no_grad():
            found.append(ready.errors(batch))
    processors = {type(one).__name__ for one in ready.family.denoiser.attn_processors.values()}
    assert processors == {"XFormersAttnProcessor"}
    torch.testing.assert_close(*found, rtol=0.01, atol=0)
