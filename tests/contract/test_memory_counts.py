"""The numbers of parameters in the memory estimate, counted on the real classes without data."""

import pytest
import torch

from diffusion_api.memory import PIXELS_ENCODED_AT_A_TIME
from diffusion_api.memory_table import NETWORKS
from diffusion_trainer.cache import building
from diffusion_trainer.methods.fine_tune import _PARTS
from testkit import architectures

LINEAR_OF_ATTENTION = {
    "UNet": ("to_q", "to_k", "to_v", "to_out.0"),
    "MMDiT": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
}
PUBLISHED = {"SD1": 859_520_964, "SD2": 865_910_724, "SDXL": 2_567_463_684, "UNet2D": 113_673_219}
"""As the papers and model cards of the checkpoints have them: the configurations used here are the right ones."""


def count(module, containing=""):
    return sum(p.numel() for name, p in module.named_parameters() if containing in name)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_counts(name):
    network = NETWORKS[name]
    with torch.device("meta"):
        denoiser = architectures.denoiser(name)
        encoders = [count(encoder) for encoder in architectures.text_encoders(name)]
        vae = count(architectures.vae(name)) if name != "UNet2D" else 0
    assert count(denoiser) == network.parameters == PUBLISHED.get(name, network.parameters)
    assert sum(buffer.numel() for buffer in denoiser.buffers()) == network.buffers
    assert (vae, tuple(encoders)) == (network.vae, network.text_encoders)
    if name == "UNet2D":
        return  # only ever trained as a whole
    assert (count(denoiser, ".attn"), count(denoiser, ".attn2.")) == (network.attention, network.cross_attention)
    parts = {"All": network.parameters, "Attention": network.attention, "CrossAttention": network.cross_attention}
    weights = dict(denoiser.named_parameters())
    for part, chosen in _PARTS.items():  # what fineTune.parts really trains
        assert sum(weight.numel() for path, weight in weights.items() if chosen.search(path)) == parts[part]
    attention = feed_forward = 0
    for path, module in denoiser.named_modules():
        if isinstance(module, torch.nn.Linear):
            size = module.in_features + module.out_features
            attention += size * path.endswith(LINEAR_OF_ATTENTION["MMDiT" if name.startswith("SD3") else "UNet"])
            feed_forward += size * path.endswith((".net.0.proj", ".net.2"))
    assert (attention, attention + feed_forward) == (network.lora_attention, network.lora_all)


def test_images_are_encoded_in_the_batches_that_are_reckoned_with():
    assert building._PIXELS_AT_A_TIME == PIXELS_ENCODED_AT_A_TIME
