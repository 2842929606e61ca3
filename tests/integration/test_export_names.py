"""Names of whole models in other programs' files, for every family: proven by readers that are not ours."""

import re

import pytest
import torch
from diffusers.loaders import single_file_utils

from diffusion_api.job import TrainerSpec
from diffusion_trainer.export import original_names
from diffusion_trainer.export.adapter_names import kohya_denoiser, kohya_text
from diffusion_trainer.export.kohya_mmdit import Adapter, kohya_mmdit
from diffusion_trainer.export.merging import merge
from diffusion_trainer.export.original_mmdit import mmdit
from diffusion_trainer.export.original_text import clip, open_clip
from testkit import architectures


def random(module, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=numbers))
    return dict(module.state_dict())


def same(found, wanted):
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def tiny_mmdit():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=8,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def test_sd3s_transformer_comes_back_from_its_original_names():
    weights = random(tiny_mmdit())
    original = mmdit(weights)
    assert "model.diffusion_model.joint_blocks.2.context_block.attn.qkv.weight" in original
    assert not any("joint_blocks.2.context_block.mlp" in name for name in original)
    same(single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(original)), weights)


def test_a_weight_that_is_no_mmdits():
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.strange\.weight is no weight"):
        mmdit({"transformer_blocks.0.strange.weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def clip_g():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=16,
    )
    return CLIPTextModelWithProjection(config)


@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", "conditioner.embedders.1.model."])
def test_openclip_comes_back_from_its_original_names(clip_g, prefix):
    weights = {name: value for name, value in random(clip_g).items() if not name.endswith("position_ids")}
    if prefix.startswith("cond"):  # SD2's has no projection
        weights.pop("text_projection.weight")
    original = open_clip(weights, prefix)
    assert f"{prefix}transformer.resblocks.1.attn.in_proj_weight" in original
    same(single_file_utils.convert_open_clip_checkpoint(clip_g, dict(original), prefix), weights)


def test_clip_l_comes_back_with_or_without_transformers_prefix():
    weights = {"encoder.layers.0.mlp.fc1.weight": torch.ones(1), "final_layer_norm.bias": torch.zeros(1)}
    prefix = "conditioner.embedders.0.transformer."
    wanted = {f"text_model.{name}": value for name, value in weights.items()}
    same(single_file_utils.convert_ldm_clip_checkpoint(clip(weights, prefix)), wanted)
    same(single_file_utils.convert_ldm_clip_checkpoint(clip(wanted, prefix)), wanted)


def test_the_names_of_the_real_sdxl_are_those_of_its_checkpoint():
    """1680 weights; some of them as they stand in sd_xl_base_1.0.safetensors."""
    with torch.device("meta"):
        names = original_names.unet(architectures.denoiser("SDXL").state_dict())
    short = {name.removeprefix("model.diffusion_model.") for name in names.values()}
    assert len(short) == len(names) == 1680
    assert short >= {
        "label_emb.0.0.weight",
        "label_emb.0.2.bias",
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
        "middle_block.1.transformer_blocks.9.attn1.to_out.0.bias",
        "output_blocks.2.2.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.8.0.skip_connection.weight",
    }


# --- kohya ---


def test_kohyas_names_of_the_real_sdxl_are_those_of_the_original_network():
    """sd-scripts trains SDXL as the original network: 70 transformer blocks with ten linear layers each."""
    with torch.device("meta"):
        unet = architectures.denoiser("SDXL")
    suffixes = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".ff.net.2")
    paths = [name for name, _ in unet.named_modules() if name.endswith(suffixes)]
    found = kohya_denoiser(paths, unet.state_dict(), "SDXL")
    assert len(set(found.values())) == 700
    layer = r"transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))"
    place = r"(input_blocks_[4578]|output_blocks_[0-5]|middle_block)_1"
    assert all(re.fullmatch(f"lora_unet_{place}_{layer}", name) for name in found.values())
    query = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert found[query] == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def test_kohyas_names_of_text_encoders():
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    assert kohya_text("text_encoder", path, "SD1") == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert kohya_text("text_encoder", path, "SDXL") == "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    assert kohya_text("text_encoder_2", path, "SDXL") == "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize("dora", [False, True])
def test_sd3s_adapters_mean_the_same_on_the_original_network(dora):
    """Merged by hand into the original weights, by kohya's names: what diffusers' names give, renamed."""
    base = random(tiny_mmdit())
    lora = TrainerSpec.model_validate(
        {
            "method": "LoRA",
            "lora": {"rank": 3, "alpha": 6, "useDora": dora},
            "model": {"source": "s3://a/b/"},
            "dataset": {"source": "s3://a/b/"},
            "output": {"destination": "s3://a/b/"},
        }
    ).lora
    numbers = torch.Generator().manual_seed(1)
    attention = r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    targets = rf"transformer_blocks\.\d\.({attention}|ff(_context)?\.net\.(0\.proj|2))"
    adapters, parts = {}, {}
    for name, weight in base.items():
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and re.fullmatch(targets, path):
            down = torch.randn(3, weight.shape[1], generator=numbers)
            up = torch.randn(weight.shape[0], 3, generator=numbers)
            magnitude = torch.rand(weight.shape[0], generator=numbers) if dora else None
            parts[path] = Adapter(down, up, magnitude)
            adapters |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
            adapters |= {f"{path}.lora_magnitude_vector": magnitude} if dora else {}
    merged = dict(base)
    merge(merged, adapters, lora)

    original = mmdit(base)
    places = {
        "lora_unet_" + n.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_"): n
        for n in original
    }
    for name, adapter in kohya_mmdit(parts).items():
        rank, alpha = adapter.down.shape[0], lora.alpha * adapter.alpha_factor
        weight = original[places[name]] + alpha / rank * (adapter.up @ adapter.down)
        if dora:
            weight = weight / weight.norm(dim=1, keepdim=True) * adapter.magnitude[:, None]
        original[places[name]] = weight
    wanted = mmdit(merged)
    assert all(torch.allclose(original[name], wanted[name], atol=1e-4) for name in wanted)
    assert sum(not torch.equal(wanted[name], value) for name, value in mmdit(base).items()) == len(kohya_mmdit(parts))


def test_a_module_that_kohya_has_no_name_for():
    with pytest.raises(ValueError, match=r"proj_out has no name"):
        kohya_mmdit({"proj_out": Adapter(torch.zeros(1, 1), torch.zeros(1, 1))})
