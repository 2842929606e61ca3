"""Bugs that other trainers had with files of adapters. Each is planted here, and must be found."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from diffusion_api.memory_reference import spec_of
from diffusion_api.method import LoRA
from diffusion_trainer.export import export_kohya, kohya_format
from diffusion_trainer.methods.lora import DOWN, UP
from diffusion_trainer.objective import DiscreteProcess

RANK, ALPHA = 8, 2.0
PATHS = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in"]
KOHYA = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_mid_block_attentions_0_proj_in",
}
"""Written down by hand, from what sd-scripts and the loaders of A1111 and ComfyUI look for."""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return the tensors of a file of two adapters of SD1."""
    monkeypatch.setattr(kohya_format, "published", lambda *_: {})
    family = SimpleNamespace(
        name="SD1",
        text_encoders={},
        process=DiscreteProcess(torch.linspace(0.999, 0.005, 10), "Epsilon", {}),
        file_hashes=lambda: {"unet/diffusion_pytorch_model.safetensors": "0" * 64},
    )
    weights = {path + DOWN: torch.full((RANK, 4), 0.5) for path in PATHS}
    weights |= {path + UP: torch.full((4, RANK), 0.25) for path in PATHS}
    spec = spec_of("LoRA", 512, maxSteps=1).model_copy(update={"lora": LoRA(rank=RANK, alpha=ALPHA)})

    def write():
        (path,) = export_kohya(weights, family, spec, folder=tmp_path)
        return load_file(path)

    return write


def test_diffusers_10860_keys_that_no_program_looks_for(written, monkeypatch):
    """Files of its scripts with the names of its own network: "lora key not loaded", and pictures as before."""

    def check():
        found = written()
        assert {key.partition(".")[0] for key in found} == KOHYA
        assert {key.partition(".")[2] for key in found} == {"lora_down.weight", "lora_up.weight", "alpha"}

    check()
    monkeypatch.setattr(kohya_format, "kohya_denoiser", lambda paths, *_: {path: f"unet.{path}.lora" for path in paths})
    with pytest.raises(AssertionError):
        check()


def test_diffusers_convert_state_dict_to_kohya_takes_the_rank_for_alpha(written, monkeypatch):
    """Its converter writes alpha = rank: an adapter of alpha 2 and rank 8 is applied four times too strongly."""

    def check():
        found = written()
        for name in KOHYA:
            down, up = found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"]
            update = up @ down * found[f"{name}.alpha"].item() / down.shape[0]
            # as PEFT applies it: alpha / rank * B A = 2 / 8 * (8 * 0.25 * 0.5)
            torch.testing.assert_close(update, torch.full((4, 4), 0.25))

    check()
    real = kohya_format.tensorfile.write

    def as_rank(path, tensors, metadata):
        ranks = {name: torch.tensor(float(RANK)) for name in tensors if name.endswith(".alpha")}
        real(path, {**tensors, **ranks}, metadata)

    monkeypatch.setattr(kohya_format.tensorfile, "write", as_rank)
    with pytest.raises(AssertionError):
        check()
